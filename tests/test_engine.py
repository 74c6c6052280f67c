"""The fused engine computes what the plain one does: exactly in Triton's interpreter, on a GPU
within bfloat16's precision."""

import copy
import functools
import math
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")  # made for Linux; without it training is plain

from hopper_emulator import Launcher

from hnerv_clip.bench import replay
from hnerv_clip.config import ConfigError
from hnerv_clip.engines import select
from hnerv_clip.engines.compiled import CompiledEngine
from hnerv_clip.engines.fused import decoder, layout, network
from hnerv_clip.engines.fused.decoding import Decoder
from hnerv_clip.engines.fused.engine import FusedEngine
from hnerv_clip.engines.plain import PlainEngine, SetupError
from hnerv_clip.engines.select import make_engine
from hnerv_clip.inference import embed_frames
from hnerv_clip.kernels import hopper, tiles
from hnerv_clip.model import build_model
from hnerv_clip.patches import make_grid
from hnerv_clip.video import split_frames

# Few pixels: Triton's interpreter takes its time
TINY = dict(resize_list="12_24", patch_size=8, patch_grid="2_4", enc_strds="3 2", dec_strds="3 2",
            fc_hw="2_4", enc_dim="16_16", modelsize=0.012, data_split="1_1_1")
VARIANTS = {
    "hybrid": {},
    "xyt": dict(embed="xyt_1.25_8"),
    "pe": dict(embed="pe_1.25_8"),
    "loss and boxes": dict(loss="Fusion7", inpaint_size=3),
    "two blocks": dict(num_blks="2_2", act="sin", out_bias="sigmoid"),
    "all stages": dict(clip_stage="all"),
    "pooled": dict(clip_pool=0.3),
    "jittered": dict(clip_jitter=3, clip_loss_type="centred"),
    "no head": dict(predict_clip=False, act="swish"),
    "padded": dict(enc_strds="4 2", dec_strds="4 2", act="sin"),
    "padded, boxes and pooled": dict(enc_strds="4 2", dec_strds="4 2", pad_list="16_32", loss="L1",
                                     inpaint_size=3, clip_pool=0.3),
    "padded xyt": dict(embed="xyt_1.25_8", dec_strds="4 2", fc_hw="2_3", pad_list="16_24"),
}


@pytest.fixture(scope="module")
def tiny(small_config, small_dataset):
    """(settings, dataset): the small dataset's frames, shrunk, with their embeddings."""
    config = small_config.replace(**TINY)
    frames = torch.nn.functional.interpolate(small_dataset.video.frames.float(), size=(12, 24),
                                             mode="area").round().byte()
    grid = make_grid(config.teacher, (12, 24))
    assert len(grid) == small_dataset.embeddings.shape[1]
    return config, replace(small_dataset, video=replace(small_dataset.video, frames=frames),
                           grid=grid, split=split_frames(12, config.video.data_split))


def build(kind, config, dataset, *, device="cpu", autocast=torch.float32):
    mask = None
    if config.train.inpaint_size:
        mask = torch.ones(dataset.video.frame_hw)
        mask[3:7, 7:13] = 0
        dataset = replace(dataset, mask=mask)
    model = build_model(config.model, frame_hw=dataset.video.frame_hw,
                        frame_count=len(dataset.video.frames))
    with torch.no_grad():  # the encoder's layer scale starts so small that it would hide errors
        for name, parameter in model.named_parameters():
            if name.endswith(".scale"):
                parameter.fill_(0.3)
    return kind(config, model.to(device, memory_format=torch.channels_last), dataset,
                autocast=autocast)


@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_gradients_are_the_plain_ones(tiny, variant, monkeypatch):
    """Losses and every parameter's gradient of a step, in float32, with every code path at least
    once: the third also takes the way of large images."""
    config, dataset = tiny
    config = config.replace(**VARIANTS[variant])
    if variant == "loss and boxes":
        monkeypatch.setattr(decoder, "LARGE", 16)
    plain, own = build(PlainEngine, config, dataset), build(FusedEngine, config, dataset)
    indices = torch.tensor([1, 7])
    step = dict(count=2, lr=1e-3, weight=0.5)
    torch.testing.assert_close(own.step(indices, **step), plain.step(indices, **step), rtol=1e-4,
                               atol=1e-6)
    for name, parameter in plain.model.named_parameters():
        gradient = own.parameters.grad[own.parameters.index[name]]
        error = (gradient - parameter.grad).norm() / (parameter.grad.norm() + 1e-9)
        assert error < 1e-3, f"{name}: {error:.1e}"


@pytest.mark.parametrize("optimizer", ["adam", pytest.param("adan", marks=pytest.mark.slow)])
def test_fused_steps_are_the_plain_ones(tiny, optimizer):
    """Parameters after three steps, the last after both engines' optimizers went to the other."""
    config, dataset = tiny
    config = config.replace(predict_clip=False, optimizer=optimizer, batch_size=1)
    engines = [build(kind, config, dataset) for kind in (PlainEngine, FusedEngine)]
    before = {name: p.detach().clone() for name, p in engines[0].model.named_parameters()}
    for index in (1, 7, 2):
        if index == 2:
            engines[1].sync()
            states = [copy.deepcopy(engine.optimizer.state_dict()) for engine in engines]
            for engine, state in zip(engines, reversed(states)):
                engine.load_optimizer(state)
        for engine in engines:
            engine.step(torch.tensor([index]), count=1, lr=1e-3, weight=0.0)
    engines[1].sync()
    for (name, p), q in zip(engines[0].model.named_parameters(), engines[1].model.parameters()):
        assert (p - q).norm() < 0.02 * (p - before[name]).norm() + 1e-9, name


@pytest.fixture
def hopper_on_cpu(monkeypatch, tmp_path):
    """The Hopper kernels, on an emulated GPU of a few multiprocessors, also for small images."""
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler to emulate the GPU with")
    monkeypatch.setattr(hopper, "available", lambda device: True)
    monkeypatch.setattr(hopper, "convolve", Launcher(tmp_path))
    monkeypatch.setattr(layout, "LARGE_IMAGE", 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda device: SimpleNamespace(multi_processor_count=20))


@pytest.mark.parametrize("variant", ["hybrid", *(pytest.param(v, marks=pytest.mark.slow) for v in (
    "loss and boxes", "two blocks", "all stages"))])
def test_gradients_by_hopper_kernels_are_the_plain_ones(tiny, variant, hopper_on_cpu):
    """Likewise, where the decoder's last block and the RGB head round to bfloat16; and frames."""
    config, dataset = tiny
    config = config.replace(**TINY | VARIANTS[variant] | dict(
        resize_list="16_64", enc_strds="4 2", dec_strds="4 2", fc_hw="2_8", ks="0_3_5"))
    frames = torch.nn.functional.interpolate(dataset.video.frames.float(), size=(16, 64),
                                             mode="bilinear").round().byte()
    dataset = replace(dataset, video=replace(dataset.video, frames=frames),
                      grid=make_grid(config.teacher, (16, 64)))
    plain, own = build(PlainEngine, config, dataset), build(FusedEngine, config, dataset)
    step = dict(count=2, lr=0.0, weight=0.5)
    torch.testing.assert_close(own.step(torch.tensor([1, 7]), **step),
                               plain.step(torch.tensor([1, 7]), **step), rtol=0.01, atol=1e-3)
    assert {hopper.sources(dict(macros))[-1] for macros in hopper.convolve.kernels} == {
        "conv.cu", "rgb_forward.cu", "rgb_backward.cu", "weight_gradient.cu"}
    for name, parameter in plain.model.named_parameters():
        gradient = own.parameters.grad[own.parameters.index[name]]
        error = (gradient - parameter.grad).norm() / (parameter.grad.norm() + 1e-9)
        assert error < 0.03, f"{name}: {error:.1e}"
    decode = Decoder(own.model, batch=2, centres=dataset.grid.centres)
    with torch.inference_mode():
        embeddings = embed_frames(plain.model, dataset)[:2]
        expected = plain.model.rgb(plain.model.stages(embeddings)[-1]) * 255
        assert (decode(embeddings)[0].float() - expected).abs().max() < 3


def test_fused_training_goes_on_from_a_checkpoint_and_with_short_batches(tiny):
    """Four steps, the third with one frame, the last two by an engine that took over the state."""
    config, dataset = tiny
    batches = [torch.tensor(b) for b in ([0, 1], [2, 3], [4], [5, 6])]

    def run(engine, batches):
        return [engine.step(b, count=len(b), lr=1e-3, weight=0.5).clone() for b in batches]

    plain = build(PlainEngine, config, dataset)
    expected = run(plain, batches)
    first = build(FusedEngine, config, dataset)
    got = run(first, batches[:2])
    first.sync()
    second = build(FusedEngine, config, dataset)
    second.model.load_state_dict(first.model.state_dict())
    second.load_optimizer(first.optimizer.state_dict())
    got += run(second, batches[2:])
    torch.testing.assert_close(torch.stack(got), torch.stack(expected), rtol=1e-3, atol=1e-5)
    second.sync()
    for (name, a), b in zip(plain.model.named_parameters(), second.model.parameters()):
        assert (a - b).norm() < 0.02 * a.norm() + 1e-3, name


def test_the_fused_decoder_gives_the_models_frames_and_vectors(tiny):
    config, dataset = tiny
    model = build_model(config.model, frame_hw=(12, 24), frame_count=12).eval()
    with torch.inference_mode():
        embeddings = embed_frames(model, dataset)[:2]
        stages = model.stages(embeddings)
        expected = (model.rgb(stages[-1]) * 255).round().clamp(0, 255)
        decode = Decoder(model, batch=2, centres=dataset.grid.centres)
        frames, vectors = decode(embeddings, clip=True)
        assert (frames.float() - expected).abs().max() <= 1  # one rounds half up, one to even
        torch.testing.assert_close(vectors, model.clip_at(stages, dataset.grid.centres))
        assert decode(embeddings, rgb=False, clip=True)[0] is None


@pytest.mark.slow  # a minute; Triton compiles some dozens of kernels
def test_every_kernel_compiles_for_a_gpu():
    """The interpreter allows what no GPU can do, such as products of 8 columns."""
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [FusedEngine, CompiledEngine])
def test_fast_and_plain_agree_on_a_gpu(small_config, small_dataset, kind):
    """All in bf16: losses of 12 steps, among them short batches and both phases, within 2%."""
    indices = torch.arange(11, device="cuda")
    losses = [torch.stack([
        own.step(indices[:1] if step % 5 == 4 else indices[step % 10:step % 10 + 2],
                 count=1 if step % 5 == 4 else 2, lr=1e-3, weight=0.5 * (step >= 8)).clone()
        for step in range(12)])[:, :3] for own in (
            build(k, small_config, small_dataset, device="cuda", autocast=torch.bfloat16)
            for k in (PlainEngine, kind))]
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["hybrid", "loss and boxes", "two blocks", "all stages",
                                     "pooled", "jittered", "no head"])
def test_hopper_kernels_give_what_tritons_give(small_config, small_dataset, monkeypatch, variant):
    """Losses, every gradient and decoded frames, with two frames a step and with one."""
    if not hopper.available(torch.device("cuda")):
        pytest.skip("needs a Hopper GPU")
    monkeypatch.setattr(layout, "LARGE_IMAGE", 1)
    small_config = small_config.replace(**VARIANTS[variant])
    found = []
    for available in (True, False):
        monkeypatch.setattr(hopper, "available", lambda device, known=available: known)
        own = build(FusedEngine, small_config, small_dataset, device="cuda",
                    autocast=torch.bfloat16)
        network = own.networks[small_config.train.batch_size]
        assert network.rgb_head.conv.blocked == available
        assert any(conv.blocked for conv in network.convs) == available
        for count in (1, 2):
            indices = torch.arange(3, 3 + count, device="cuda")
            losses = own.step(indices, count=count, lr=0.0, weight=0.5).clone()
            gradients = {name: own.parameters.grad[place].clone()
                         for name, place in own.parameters.index.items()}
            found.append((losses, gradients))
        head = small_config.model.predict_clip
        decode = Decoder(own.model, batch=2, centres=small_dataset.grid.centres if head else None)
        stem = network.convs[0]
        shape = 2, stem.CI, stem.H, stem.W
        embeddings = torch.linspace(-1, 1, math.prod(shape), device="cuda").view(shape)
        frames, vectors = decode(embeddings, clip=head)
        found.append((frames.clone(), frames[:0] if vectors is None else vectors.clone()))
    for (losses, gradients), (known, expected) in zip(found[:2], found[3:5]):
        torch.testing.assert_close(losses, known, rtol=1e-3, atol=1e-4)
        for name, gradient in gradients.items():
            error = (gradient - expected[name]).norm() / (expected[name].norm() + 1e-9)
            assert error < 0.05, f"{name}: {error:.1e}"
    assert (found[2][0].float() - found[5][0].float()).abs().max() <= 2
    torch.testing.assert_close(found[2][1], found[5][1], rtol=0.02, atol=0.02)


def test_what_the_kernels_do_not_know_is_named(small_config):
    def model(**settings):
        return build_model(small_config.replace(**settings).model, frame_hw=(80, 160),
                           frame_count=12)

    assert network.unsupported(model()) is None
    assert "relu6" in network.unsupported(model(act="relu6"))
    assert "norm='bn'" in network.unsupported(model(norm="bn"))
    assert "stride of 5" in network.unsupported(model(dec_strds="2 2 4 5"))


def test_block_sizes_fit_the_shared_memory(monkeypatch):
    for room in (232448, 166912, 101376, 65536):
        monkeypatch.setattr(tiles, "_shared_memory", lambda room=room: room)
        for n in (16, 1000, 5000, 40000, 800000):
            for columns in (16, 64, 80, 112, 136, 640):
                for tile in (tiles.product_tile(n, columns, 200),
                             tiles.gradient_tile(n, columns, 200)):
                    assert 2 * tile["STAGES"] * tile["BK"] * (
                        tile["BM"] + tile["BN"] + tile["BN2"]) <= room


def test_the_fast_engine_is_refused_without_a_gpu(small_config, small_dataset):
    config = small_config.replace(engine="fast")
    model = build_model(config.model, frame_hw=small_dataset.video.frame_hw, frame_count=12)
    with pytest.raises(ConfigError, match="needs a GPU, not cpu; use engine='auto'"):
        make_engine(config, model, small_dataset, autocast=torch.bfloat16)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("hnerv_clip.devices.shutil.which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    assert "install gcc" in select._no_fast_engine(torch.device("cuda"), True)
    monkeypatch.setenv("CC", "/usr/bin/cc")
    assert select._no_fast_engine(torch.device("cuda"), True) is None


@pytest.mark.parametrize("reason", ["old GPU", "no compiler", "no memory"])
def test_auto_goes_on_plainly_and_says_why(small_config, small_dataset, monkeypatch, reason):
    """A GPU is made up: what it cannot do leaves the plain engine."""
    class Model:
        def parameters(self):
            yield SimpleNamespace(device=torch.device("cuda"))

    def fails(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError("too much") if reason == "no memory" else \
            RuntimeError("Failed to find C compiler.")

    said = {"old GPU": "no bfloat16", "no compiler": "C compiler", "no memory": "memory"}[reason]
    monkeypatch.setattr(select, "_no_fast_engine", lambda device, half:
                        said if reason == "old GPU" else None)
    monkeypatch.setattr(select.fused, "unsupported", lambda model: None)
    monkeypatch.setattr(select, "FusedEngine", fails)
    monkeypatch.setattr(select, "PlainEngine", lambda *args, **kwargs: "plain")
    with pytest.warns(UserWarning, match=said):
        assert make_engine(small_config, Model(), small_dataset, autocast=torch.bfloat16) == "plain"


def test_the_plain_engine_goes_on_where_the_fused_one_cannot(tiny, monkeypatch):
    """Two fused steps, then two plain ones, are four plain ones."""
    config, dataset = tiny
    batches = [torch.tensor([step, step + 1]) for step in range(4)]
    step = dict(count=2, lr=1e-3, weight=0.5)
    plain, own = build(PlainEngine, config, dataset), build(FusedEngine, config, dataset)
    expected = torch.stack([plain.step(batch, **step).clone() for batch in batches])
    got = [own.step(batch, **step).clone() for batch in batches[:2]]
    with pytest.raises(SetupError, match="RuntimeError: no such kernel") as caught:
        monkeypatch.setattr(own.networks[2], "decode", no_kernel)
        own.step(batches[2], **step)
    assert select.can_fall_back(own)
    with pytest.warns(UserWarning, match="plain engine.*no such kernel"):
        own = select.fall_back(own, dataset, str(caught.value))
    assert type(own) is PlainEngine and not select.can_fall_back(own)
    got += [own.step(batch, **step).clone() for batch in batches[2:]]
    torch.testing.assert_close(torch.stack(got), expected, rtol=1e-3, atol=1e-5)
    for (name, a), b in zip(plain.model.named_parameters(), own.model.parameters()):
        assert (a - b).norm() < 0.02 * a.norm() + 1e-3, name


def test_a_compiler_that_fails_at_the_first_step_is_a_failed_setup():
    """Which the plain engine then takes over; memory that runs out is told apart."""
    own = object.__new__(CompiledEngine)
    own.lr, own.weight, own.indices = torch.zeros(3, 1)
    own.graph = None
    step, indices = dict(count=1, lr=1e-3, weight=0.5), torch.zeros(1)
    for error, kind in [(AssertionError("the compiler gave up"), SetupError),
                        (torch.cuda.OutOfMemoryError("full"), torch.cuda.OutOfMemoryError)]:
        own._set_up = functools.partial(_raise, error)
        with pytest.raises(kind, match="AssertionError: the compiler gave up|full"):
            own.step(indices, **step)


def _raise(error):
    raise error


def no_kernel(*args, **kwargs):
    raise RuntimeError("no such kernel")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [FusedEngine, CompiledEngine])
def test_what_cannot_be_captured_is_named_and_nothing_of_it_applied(small_config, small_dataset,
                                                                    monkeypatch, kind):
    """Not «unjoined work», which is what an open side stream makes of it; then plain steps."""
    config = small_config.replace(loss="L1")
    own = build(kind, config, small_dataset, device="cuda", autocast=torch.bfloat16)
    indices, step = torch.arange(2, device="cuda"), dict(count=2, lr=1e-3, weight=0.5)
    monkeypatch.setattr(torch.cuda, "graph", broken(torch.cuda.graph, own, monkeypatch))
    with pytest.raises(SetupError) as caught:
        for _ in range(6):
            own.step(indices, **step)
    assert "unjoined" not in str(caught.value)
    own.sync()
    before = {name: value.clone() for name, value in own.model.state_dict().items()}
    with pytest.warns(UserWarning, match="plain engine"):
        own = select.fall_back(own, small_dataset, str(caught.value))
    assert all(torch.equal(value, before[name]) for name, value in own.model.state_dict().items())
    assert own.step(indices, **step).isfinite().all()


def broken(graph, own, monkeypatch):
    """`torch.cuda.graph`, within which the optimizer's step begins with a copy from the CPU."""
    def begin(*args, **kwargs):
        target = own.parameters if isinstance(own, FusedEngine) else own.optimizer
        name = "update" if isinstance(own, FusedEngine) else "step"
        real = getattr(target, name)
        monkeypatch.setattr(target, name, lambda *values: (
            torch.ones(3).to(own.device), real(*values))[1])
        return graph(*args, **kwargs)
    return begin


def test_frames_are_worked_on_in_parts_when_memory_runs_out(small_config, small_dataset,
                                                            monkeypatch):
    """The same losses and parameters as with the whole batch, and one warning."""
    whole, parts = (build(PlainEngine, small_config.replace(batch_size=4), small_dataset)
                    for _ in range(2))
    losses = parts.frame_losses

    def scarce(indices):
        if len(indices) > 2:
            raise torch.cuda.OutOfMemoryError("too much")
        return losses(indices)

    monkeypatch.setattr(parts, "frame_losses", scarce)
    indices, step = torch.tensor([0, 1, 2, 3]), dict(count=4, lr=1e-3, weight=0.5)
    with pytest.warns(UserWarning, match="2 at a time") as said:
        got = parts.step(indices, **step)
    assert len(said) == 1
    torch.testing.assert_close(got, whole.step(indices, **step))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = parts.step(indices, **step)
    torch.testing.assert_close(got, whole.step(indices, **step), rtol=1e-4, atol=1e-6)


def test_replayed_steps_are_the_same_and_a_changed_buffer_is_named(tiny, monkeypatch):
    config, dataset = tiny
    config = config.replace(**VARIANTS["pe"], predict_clip=False, batch_size=1)
    engine, steps, step = build(FusedEngine, config, dataset), [], FusedEngine.step

    def faulty(self, indices, **given):
        result = step(self, indices, **given)
        steps.append(indices)
        if len(steps) == 3 + 2:  # the second step after those that are compared with
            self.networks[1].rgb_head.dout.view(-1)[5] += 1
        return result

    monkeypatch.setattr(FusedEngine, "step", faulty)
    found = replay.replay(engine, [torch.tensor([7])], weight=0.0, seconds=0, check_steps=2)
    assert (found["steps"], found["differing"]) == (2, 1) and found["buffers"] > 15
    assert found["events"] == [{"steps": 2, "wrong": {"dout": 1}}]
