"""Memory of a GPU, or of an emulated one, for the check of the CUDA kernels."""

import numpy as np


class Torch:
    """Device memory and timing by PyTorch."""

    def __init__(self):
        import torch

        if not torch.cuda.is_available():
            raise ImportError("PyTorch sees no GPU")
        self.torch = torch
        self.event = lambda: torch.cuda.Event(enable_timing=True)
        self.elapsed = lambda start, end: start.elapsed_time(end)

    def put(self, array):
        return self.torch.from_numpy(np.ascontiguousarray(array)).cuda()

    def pointer(self, x):
        return x.data_ptr()

    def get(self, x):
        return x.cpu().numpy()


class CuPy:
    """Device memory and timing by CuPy."""

    def __init__(self):
        import cupy

        cupy.cuda.runtime.getDeviceCount()
        self.cupy = cupy
        self.event = cupy.cuda.Event
        self.elapsed = cupy.cuda.get_elapsed_time

    def put(self, array):
        return self.cupy.asarray(array)

    def pointer(self, x):
        return x.data.ptr

    def get(self, x):
        return self.cupy.asnumpy(x)


class Emulated:
    """Memory of the CPU. Around each array lie bytes which read as NaN, and which must stay."""

    MARGIN = 64

    def put(self, array):
        memory = np.full(array.nbytes + 2 * self.MARGIN, 255, np.uint8)
        x = memory[self.MARGIN : -self.MARGIN].view(array.dtype)
        x[...] = array
        return x

    def pointer(self, x):
        return x.ctypes.data

    def get(self, x):
        margins = x.base[: self.MARGIN], x.base[-self.MARGIN :]
        assert np.all(np.equal(margins, 255)), "a kernel wrote beyond an array"
        return x.copy()
