"""Ranks that train by the fused engine add up to what one plain rank computes."""

import functools

import pytest
import torch
from test_train import _free_port

pytest.importorskip("triton")  # made for Linux; without it training is plain

from test_engine import build, no_kernel, tiny  # noqa: F401  (a fixture)

from hnerv_clip.engines.fused.engine import FusedEngine
from hnerv_clip.engines.plain import PlainEngine, SetupError
from hnerv_clip.engines.select import can_fall_back, fall_back

BATCHES = [[0, 1], [2], [3, 4]]  # in the second, the other of two ranks has none


def train(kind, config, dataset, *, rank=0, world=1, failing_rank=None):
    """(sums of every step, parameters) after a step per batch, of which each rank has its share.

    On `failing_rank` the fast engine fails at the last batch; then all go on by the plain one.
    """
    engine, sums = build(kind, config, dataset), []
    for batch in BATCHES:
        step = functools.partial(engine.step, torch.tensor(batch[rank::world], dtype=torch.int64),
                                 count=len(batch), lr=1e-3, weight=0.5)
        if failing_rank is not None and batch is BATCHES[-1]:
            if rank == failing_rank:
                engine.networks[1].decode = no_kernel
            said = "no such kernel" if rank == failing_rank else "1 of 2 ranks cannot"
            with pytest.raises(SetupError, match=said):
                step()
            assert can_fall_back(engine)
            with pytest.warns(UserWarning, match="plain engine"):
                engine = fall_back(engine, dataset, said)
            step = functools.partial(engine.step, *step.args, **step.keywords)
        sums.append(step().clone())
    engine.sync()
    return torch.stack(sums), {n: p.detach().clone() for n, p in engine.model.named_parameters()}


def train_as_rank(rank, world, port, config, dataset, path, failing_rank):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank,
                                         world_size=world)
    torch.save(train(FusedEngine, config, dataset, rank=rank, world=world,
                     failing_rank=failing_rank), f"{path}{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("failing_rank", [pytest.param(None, marks=pytest.mark.slow), 1])
def test_fused_ranks_train_as_one_plain_rank(tiny, tmp_path, failing_rank):  # noqa: F811
    """Also where one of them cannot go on: both then go on by the plain engine."""
    config, dataset = tiny
    shared = config.replace(batch_size=1)
    torch.multiprocessing.start_processes(train_as_rank, nprocs=2, start_method="fork", args=(
        2, _free_port(), shared, dataset, str(tmp_path / "rank"), failing_rank))
    (sums, own), (other_sums, other) = (
        torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in (0, 1))
    expected_sums, expected = train(PlainEngine, config, dataset)
    torch.testing.assert_close(sums + other_sums, expected_sums, rtol=1e-3, atol=1e-5)
    assert not other_sums[1].any()  # it had no frame
    for name, value in expected.items():
        assert torch.equal(own[name], other[name]), name
        assert (own[name] - value).norm() < 0.02 * value.norm() + 1e-3, name
