from typing import Final

import numpy as np

OP_DTYPE: Final[np.dtype[np.void]]
