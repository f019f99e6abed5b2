from numpy.typing import ArrayLike

from ..engine.results import RunResult
from ..engine.vcpu import VCpu

def access_many(
    cpu: VCpu,
    gva: ArrayLike,
    kind: str | int | ArrayLike = "r",
    *,
    size: int | ArrayLike = 8,
    user: bool | ArrayLike | None = None,
    value: int | ArrayLike | None = None,
    data: bool | None = None,
) -> RunResult: ...
