"""Ranks that train by the fused engine add up to what one plain rank computes."""

import pytest
import torch
from test_train import _free_port

pytest.importorskip("triton")  # made for Linux; without it training is plain

from test_engine import build, tiny  # noqa: F401  (a fixture)

from hnerv_clip.engines.fused.engine import FusedEngine
from hnerv_clip.engines.plain import PlainEngine

BATCHES = [[0, 1], [2], [3, 4]]  # in the second, the other of two ranks has none


def train(kind, config, dataset, *, rank=0, world=1):
    """(sums of every step, parameters) after a step per batch, of which each rank has its share."""
    engine = build(kind, config, dataset)
    sums = [engine.step(torch.tensor(batch[rank::world], dtype=torch.int64), count=len(batch),
                        lr=1e-3, weight=0.5).clone() for batch in BATCHES]
    engine.sync()
    return torch.stack(sums), {n: p.detach().clone() for n, p in engine.model.named_parameters()}


def train_as_rank(rank, world, port, config, dataset, path):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank,
                                         world_size=world)
    torch.save(train(FusedEngine, config, dataset, rank=rank, world=world), f"{path}{rank}")
    torch.distributed.destroy_process_group()


def test_fused_ranks_train_as_one_plain_rank(tiny, tmp_path):  # noqa: F811
    config, dataset = tiny
    shared = config.replace(batch_size=1)
    torch.multiprocessing.start_processes(train_as_rank, nprocs=2, args=(
        2, _free_port(), shared, dataset, str(tmp_path / "rank")), start_method="fork")
    (sums, own), (other_sums, other) = (
        torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in (0, 1))
    expected_sums, expected = train(PlainEngine, config, dataset)
    torch.testing.assert_close(sums + other_sums, expected_sums, rtol=1e-3, atol=1e-5)
    assert not other_sums[1].any()  # it had no frame
    for name, value in expected.items():
        assert torch.equal(own[name], other[name]), name
        assert (own[name] - value).norm() < 0.02 * value.norm() + 1e-3, name
