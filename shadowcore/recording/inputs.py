"""What can be imported: files of other tools, by what the command line calls them.

What reads them is loaded where it is used, in `importers`; help needs none of it.
"""

INPUTS = {
    "linux": ".npz recordings of guests.",
    "lackey": "Texts of Valgrind's lackey, one a process.",
    "csv": "Comma-separated values: a line of names, then one for each access or event.",
    "drmemtrace": "Traces of DynamoRIO's drmemtrace (.zip, .gz), the threads of a process in one file or in several.",
    "pinatrace": "Texts of Pin's example tools pinatrace, one a process.",
    "dinero": "Texts in Dinero's input format (din), one a process.",
    "champsim": "Traces of ChampSim, one a process.",
    "cloudsuite": "Traces of ChampSim in the layout of CloudSuite, 96 bytes an instruction.",
}
"""In the order in which they are asked whose a file is: last those that take what has no mark of its own."""
