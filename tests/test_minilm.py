"""Sentence embeddings, where the model has been fetched (`rlworkbench build minilm`), and what is refused when fetching it."""

import pytest
import torch

from rlworkbench.policies import minilm
from rlworkbench.policies.micro import built_folder
from rlworkbench.policies.minilm import LONGEST, SHA256, build_minilm, load_minilm, sentence_embeddings

PAIRS = {"A cat is sleeping on the sofa.": "A kitten naps on a couch.", "The bank raised its interest rates.": "Borrowing money has become dearer.",
         "He solved the equation for x.": "The unknown was found by algebra.", "It rained all night.": "There was a downpour until the morning."}


@pytest.fixture
def built(minilm_built):
    "Sentence embeddings can be asked for."


def test_like_meaning_is_near(built):
    left, right = sentence_embeddings(PAIRS), sentence_embeddings(PAIRS.values())
    assert left.shape == (4, 384) and (left @ right.T).argmax(1).tolist() == [0, 1, 2, 3]


def test_what_its_makers_print_comes_out(built):
    e = sentence_embeddings(["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."])
    assert torch.allclose((e @ e.T)[[0, 0, 1], [1, 2, 2]], torch.tensor([.6660, .1046, .1411]), atol=1e-4)


def test_neither_batch_nor_company_nor_order_matters(built):
    texts = [*PAIRS, "x", "", " ".join(["long"] * 100), *PAIRS.values()]
    together = sentence_embeddings(texts, batch=64)
    assert torch.allclose(together.norm(dim=1), torch.ones(len(texts)), atol=1e-5)
    assert torch.allclose(together, sentence_embeddings(texts, batch=1), atol=1e-5)
    assert torch.allclose(together.flip(0), sentence_embeddings(texts[::-1], batch=3), atol=1e-5)
    assert torch.equal(sentence_embeddings("x")[0], sentence_embeddings(["x"])[0])


def test_what_is_beyond_the_longest_is_not_read(built):
    words = ["word"] * (LONGEST - 2)                                # and the two marks around them
    kept, cut, other = sentence_embeddings([" ".join(words), " ".join([*words, "stadium", "weather"]), " ".join([*words[:-2], "stadium", "weather"])])
    assert torch.allclose(kept, cut, atol=1e-5) and not torch.allclose(kept, other, atol=1e-2)


def test_a_torn_file_is_refused_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(minilm, "out_of_package", lambda *_: b"")
    monkeypatch.setattr(minilm, "chosen_files", lambda archive: (_ for _ in ()).throw(ValueError("torn")))
    with pytest.raises(ValueError, match="torn"):
        build_minilm(tmp_path / "minilm")
    assert list(tmp_path.iterdir()) == []


def test_only_the_five_files_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(minilm, "out_of_package", lambda *_: b"")
    monkeypatch.setattr(minilm, "chosen_files", lambda archive: {name: b"{}" for name in SHA256})
    build_minilm(tmp_path / "minilm")
    assert {f.name for f in (tmp_path / "minilm").iterdir()} == {*SHA256, "making.json"} and not any("/" in n or n.endswith((".py", ".bin")) for n in SHA256)


def test_missing_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="fetch it once with: rlworkbench build minilm"):
        sentence_embeddings(["x"], folder=tmp_path / "minilm")


def test_a_policy_folder_is_not_touched_by_loading(built):
    folder = built_folder("minilm")
    before = {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}
    load_minilm.cache_clear()
    sentence_embeddings(["x"])
    assert {f.name: f.stat().st_mtime_ns for f in folder.iterdir()} == before
