"""Nothing in a training step reads a value back from the device, which would wait for all that was begun before."""

from functools import partial

import pytest
import torch
from launches import Launches
from pytorch_lightning import Callback
from test_linear_probe import Images, coloured
from tiny import fit, tiny_method
from torch.utils._python_dispatch import TorchDispatchMode

from mlflow_ssl import callbacks as ours
from mlflow_ssl.optimizers import LARS

READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")
"""Operations whose result the host needs: `item`, `float`, `bool` and `tolist` are the first."""

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


class Reads(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in READS or by_mask:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class Watch(Callback):
    """Note what is read between the beginnings of two batches, and what is logged of it."""

    def __init__(self, mode=Reads):
        self.reads, self.logged, self._mode, self._make = [], [], None, mode

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._leave()
        log = type(pl_module).log
        pl_module.log = lambda name, value, **kw: self.logged.append((name, value)) or log(pl_module, name, value, **kw)
        self._mode = self._make()
        self._mode.__enter__()

    def _leave(self):
        if self._mode is not None:
            self._mode.__exit__(None, None, None)
            self.reads.append(self._mode.names)
            self._mode = None

    on_train_epoch_end = on_exception = lambda self, *_: self._leave()


def watched(tmp_path, *more, mode=Reads):
    watch = Watch(mode)
    made = [
        watch,
        ours.KNNEvaluation(),
        ours.Health(),
        ours.LinearProbe(),
        ours.BadImages(),
        ours.LastCheckpoint(str(tmp_path)),
        ours.CheckpointUpload(),
        ours.StepMetrics(),
        ours.Progress(),
        *more,
    ]
    method = tiny_method(optimizer=partial(LARS, lr=0.1, weight_decay=1e-6))
    fit(method, Images(coloured(5)), callbacks=made, max_epochs=1, limit_val_batches=0, enable_progress_bar=True)
    return watch


def test_no_step_reads_a_value_back(tmp_path):
    assert watched(tmp_path).reads == [[]] * 5


def test_reading_a_value_back_would_be_noticed(tmp_path):
    class Reader(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            bool(outputs["loss"] > 0)
            batch[1][batch[1] > 0]

    assert watched(tmp_path, Reader()).reads == [["_local_scalar_dense", "index"]] * 5


def test_each_number_that_a_step_logs_is_a_tensor_already(tmp_path):
    logged = watched(tmp_path).logged
    names = {"train/loss", "train/tau", "train/lr", "train/images_per_second", "train/data_wait_share"}
    assert {name for name, _ in logged} == names
    assert all(isinstance(value, torch.Tensor) for _, value in logged)


def test_a_step_adds_few_operations_to_forward_and_backward(tmp_path):
    method, (views, _) = tiny_method(), coloured(1)[0]
    with Launches() as bare:
        method.loss(method.predictor(method.online(views[0])), method.target(views[1])).mean().backward()
    whole = watched(tmp_path, mode=Launches).reads
    # the first step makes what the others use again
    assert max(len(names) - 2 * bare.count for names in whole[1:]) <= 75
