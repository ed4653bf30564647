"""Operations that a device would be given, counted on a processor."""

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FREE = ("empty", "new_empty", "detach", "scalar_tensor", "_record_function")
"""Operations that move nothing."""


class Launches(TorchDispatchMode):
    """Count the operations that are at least one kernel each on a GPU.

    An operation on lists of tensors is one for all where the lists match in shapes and layout, or have numbers
    beside them; otherwise torch falls back to one a tensor.
    """

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(FREE):
            self.names += [name] * (len(args[0]) if name.startswith("_foreach") and not _alike(args) else 1)
        return func(*args, **(kwargs or {}))

    @property
    def count(self):
        return len(self.names)


def _alike(args):
    lists = [each for each in args if isinstance(each, list | tuple) and each and isinstance(each[0], Tensor)]
    return all(
        len({(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors}) == 1
        for tensors in zip(*lists, strict=True)
    )
