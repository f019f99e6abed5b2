"""Build of the extension modules: pyx/PACKAGE/NAME.pyx, with the header shadowcore/PACKAGE/NAME.pxd, becomes
shadowcore.PACKAGE.NAME.

Flavours, by environment variables that combine:
  SHADOWCORE_DEBUG=1                     bounds checks, assertions (SC_DEBUG=1 in the C code), -O1 -g
  SHADOWCORE_SANITIZE=address,undefined  the C compiler's sanitizers, -O1 -g
  SHADOWCORE_NATIVE=1                    tuned to this machine's CPU: not for wheels that travel
  SHADOWCORE_ABI3=1                      the stable ABI of CPython 3.12, for that version and all later ones
"""

import hashlib
import json
import os
import re
import sys
from pathlib import Path

import Cython
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

BUILD = Path("build")
JOBS = os.cpu_count() or 1
CIMPORT = re.compile(r"^[ \t]*(?:from[ \t]+([\w.]+)[ \t]+)?cimport[ \t]+(\([^)]*\)|(?:\\\n|[^\n#])*)", re.M)


def flavour(env):
    """Cython directives, and arguments of Extension, for the build that the environment asks for."""
    debug = env.get("SHADOWCORE_DEBUG", "0") not in ("", "0")
    native = env.get("SHADOWCORE_NATIVE", "0") not in ("", "0")
    sanitize = env.get("SHADOWCORE_SANITIZE", "")
    abi3 = stable_abi(env)
    directives = {
        "language_level": 3,
        "boundscheck": debug,
        "initializedcheck": debug,
        "wraparound": False,
        "cdivision": True,
        "binding": True,
        "embedsignature": True,
        "embedsignature.format": "python",
        "auto_pickle": False,
        "autotestdict": False,
        "freethreading_compatible": False,
    }
    compile_args = ["-fno-strict-aliasing"]
    compile_args += ["-O1"] if debug or sanitize else ["-O3"]
    compile_args += ["-UNDEBUG"] if debug else []
    compile_args += ["-g", "-fno-omit-frame-pointer"] if debug or sanitize else ["-g0"]
    compile_args += ["-march=native"] if native else []
    sanitizers = [f"-fsanitize={sanitize}"] if sanitize else []
    macros = [("SC_DEBUG", "1")] if debug else []
    if not debug and not sanitize:
        # A walk is compiled once for each paging mode by inlining one body with a constant descriptor; left to itself
        # the compiler keeps a single copy that reads the descriptor at run time (20 % on 4-level faults). Under
        # sanitizers that would be ten minutes of compilation for one.
        macros.append(("CYTHON_INLINE", "inline __attribute__((always_inline))"))
    if abi3:
        macros.append(("Py_LIMITED_API", "0x030C0000"))
    arguments = {
        "include_dirs": ["shadowcore/include"],
        "define_macros": macros,
        "extra_compile_args": compile_args + sanitizers,
        "extra_link_args": sanitizers,
    }
    return directives, arguments


def stable_abi(env):
    """Is the build for the stable ABI? Scalar calls from Python then take 1.3 times as long, batches do not."""
    return env.get("SHADOWCORE_ABI3", "0") not in ("", "0")


def check_host(maxsize=sys.maxsize, byteorder=sys.byteorder, version=sys.version_info, abi3=False):
    """Table entries are read in place as 64-bit little-endian words, and RAM is indexed by Py_ssize_t."""
    if maxsize < 2**63 - 1 or byteorder != "little":
        bits = maxsize.bit_length() + 1
        sys.exit(f"shadowcore needs a 64-bit little-endian host; this one is {bits}-bit {byteorder}-endian")
    if abi3 and version < (3, 12):
        sys.exit(f"SHADOWCORE_ABI3 needs Python 3.12 or newer; this is {version[0]}.{version[1]}")


def sources(root):
    """The Cython files under `root`, by the name of the module that each becomes."""
    files = sorted(root.glob("pyx/**/*.pyx"))
    return {".".join(["shadowcore", *path.relative_to(root / "pyx").with_suffix("").parts]): path for path in files}


def cimports(text, package="shadowcore"):
    """Dotted names below shadowcore that a .pyx or .pxd text of `package` cimports from, modules and members alike."""
    found = set()
    for origin, names in CIMPORT.findall(text):
        words = re.findall(r"[\w.]+", names)
        if origin.startswith("."):
            origin = f"{package}{origin}".rstrip(".")
        found.update([origin] if origin else [], [f"{origin}.{word}" if origin else word for word in words])
    return {name for name in found if name.startswith("shadowcore.")}


def fingerprints(root, settings):
    """For each module, a digest of all that its C code is made from: settings, source, headers however deep.

    Cython and setuptools compare dates of files. They miss a module's own header (it lies in another
    directory than its source), every change of directives, flags and versions, and files that became older.
    """
    headers = {
        ".".join(path.relative_to(root).with_suffix("").parts): path.read_text("utf-8")
        for path in root.glob("shadowcore/**/*.pxd")
    }
    c_headers = [path.read_text("utf-8") for path in sorted(root.glob("shadowcore/include/*.h"))]
    result = {}
    for module, source in sources(root).items():
        text = source.read_text("utf-8")
        needed, todo = set(), {module} | cimports(text)
        while todo:
            name = todo.pop()
            if name in headers and name not in needed:
                needed.add(name)
                todo |= cimports(headers[name])
        parts = [settings, text, [headers[name] for name in sorted(needed)], c_headers]
        result[module] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return result


def remembered(build):
    """The fingerprints with which the C files under `build` were made."""
    stamp = build / "fingerprints.json"
    known = json.loads(stamp.read_text("utf-8")) if stamp.exists() else {}
    return {name: value for name, value in known.items() if c_file(build, name).exists()}


def remember(build, known):
    build.mkdir(exist_ok=True)
    (build / "fingerprints.json").write_text(json.dumps(known, indent=1), "utf-8")


def c_file(build, name):
    return build / "cython" / "pyx" / Path(*name.split(".")[1:]).with_suffix(".c")


class BuildExt(build_ext):
    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or JOBS
        if self.inplace:
            # setuptools would build an editable install in a directory that is thrown away, whole, each time.
            self.build_lib = str(BUILD / "inplace")

    def build_extensions(self):
        directives, arguments = flavour(os.environ)
        if self.compiler.compiler_type == "msvc":
            macros = [macro for macro in arguments["define_macros"] if macro[0] != "CYTHON_INLINE"]
            arguments = {"include_dirs": arguments["include_dirs"], "define_macros": macros}
        variables = [os.environ.get(name, "") for name in ("CC", "CFLAGS", "CPPFLAGS", "LDFLAGS")]
        current = fingerprints(Path(), [Cython.__version__, directives, arguments, variables])
        known = {} if self.force else remembered(BUILD)
        fresh = {name: value for name, value in current.items() if known.get(name) == value}
        # Forgotten first, so that the C file of a translation that fails is not taken for a good one.
        remember(BUILD, fresh)
        cythonize(
            [Extension(name, [str(path)]) for name, path in sources(Path()).items() if name not in fresh],
            include_path=["."],
            build_dir=str(BUILD / "cython"),
            compiler_directives=directives,
            nthreads=JOBS,
            force=True,
        )
        remember(BUILD, current)
        # A C file that is made anew is newer than any object made from the old one, in whichever directory
        # that lies, so that from here the usual comparison of dates is right.
        for ext in self.extensions:
            ext.sources = [str(c_file(BUILD, ext.name))]
            for name, value in arguments.items():
                setattr(ext, name, value)
        super().build_extensions()


if __name__ == "__main__":
    abi3 = stable_abi(os.environ)
    check_host(abi3=abi3)  # before pip turns to the dependencies, which it may have to build
    setup(
        cmdclass={"build_ext": BuildExt},
        ext_modules=[
            Extension(name, [source.as_posix()], py_limited_api=abi3) for name, source in sources(Path()).items()
        ],
        # A directory of its own: a wheel holds all that lies in there, whatever flavour it was built for.
        options={"bdist_wheel": {"py_limited_api": "cp312"}, "build": {"build_base": "build/abi3"}} if abi3 else {},
    )
