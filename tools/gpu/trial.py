"""The child process of a trial on the emulated GPU; common/kernels/cuda/trial.py starts it.

python -m tools.gpu.trial LIBRARY CONFIGURATIONS ...

The environment variable MOCK_FAULT plants a fault in the driver; see mock_cuda.cpp.
"""

import ast
import sys
from pathlib import Path

from common.kernels import cuda
from common.kernels.cuda import trial
from common.program import start
from tools.gpu import rehearsal

if __name__ == "__main__":
    start()
    rehearsal.load(Path(sys.argv.pop(1)))
    cuda.CONFIGURATIONS = ast.literal_eval(sys.argv.pop(1))
    trial.main()
