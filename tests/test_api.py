"""The Python API: what it loads, its logits, its continuations, and that importing it is cheap."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from test_convert import save_workdir
from tiny import ROOT, apply_logits, byte_tokenizer, random_params, row_positions, tiny_config

import qwen_jax
from qwen_jax import api
from qwen_jax.generate.sampling import GREEDY
from qwen_jax.model.context import ContextConfig

CFG = tiny_config()
NUM_REAL = byte_tokenizer().vocab_size
IDS = [5, 300, 17, 220, 4]


@pytest.fixture(scope="module")
def params():
    return random_params(CFG)


@pytest.fixture(scope="module")
def workdir(params, tmp_path_factory):
    return save_workdir(tmp_path_factory.mktemp("run"), CFG, params)


@pytest.fixture(scope="module")
def model(workdir):
    return qwen_jax.load(workdir)


@pytest.mark.parametrize("code", ["import qwen_jax", "import qwen_jax.text.chatml"])
def test_import_starts_no_jax(code):
    code += "; import sys; assert 'jax' not in sys.modules and 'flax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_names_of_the_package():
    assert qwen_jax.load is api.load and qwen_jax.complete is api.complete
    assert set(qwen_jax.__all__) <= set(dir(qwen_jax))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = qwen_jax.nothing


def test_load(model, workdir):
    assert model.trained_len == model.max_positions == 48 and not model.chat
    assert "block_1" in model.params and model.cfg.scan_layers is False
    assert model.num_real == NUM_REAL
    longer = qwen_jax.load(workdir, context=ContextConfig(48, dynamic_ntk=True), max_positions=96)
    assert longer.max_positions == 96 and longer.context.dynamic_ntk
    with pytest.raises(ValueError, match="neither a workdir"):
        qwen_jax.load(workdir / "nowhere")


def test_logits_equal_a_plain_pass(model, params):
    ours = qwen_jax.logits(model, IDS)
    tokens = np.array([IDS], np.int32)
    plain = np.asarray(apply_logits(params, tokens, row_positions(1, len(IDS)), None, CFG))
    assert ours.shape == (len(IDS), NUM_REAL) and plain.shape[-1] > NUM_REAL
    np.testing.assert_allclose(ours, plain[0, :, :NUM_REAL], atol=1e-4)
    both = qwen_jax.logits(model, np.array([IDS, IDS[::-1]]))
    np.testing.assert_allclose(both[0], ours, atol=1e-4)
    assert np.abs(both[1] - ours).max() > 0.1


@pytest.mark.parametrize("wrong", [[], [1.5], [[[1]]], [NUM_REAL], [-1]])
def test_logits_refuse(model, wrong):
    with pytest.raises(ValueError, match="token_ids"):
        qwen_jax.logits(model, wrong)


def test_complete_is_greedy_over_logits(model):
    texts = ["def f(", IDS, ""]
    answers = qwen_jax.complete(model, texts, max_new_tokens=6, stop_ids=())
    rows = [model.tokenizer.encode("def f("), IDS, [model.tokenizer.end_of_text]]
    for row, answer in zip(rows, answers, strict=True):
        sequence = list(row)
        for token, log_prob in zip(answer.tokens, answer.log_probs, strict=True):
            scores = qwen_jax.logits(model, sequence)[-1].astype(np.float64)
            assert token == scores.argmax()
            log_total = np.log(np.exp(scores - scores.max()).sum()) + scores.max()
            assert log_prob == pytest.approx(scores[token] - log_total, abs=1e-3)
            sequence.append(token)
        assert answer.text == model.tokenizer.decode(answer.tokens, skip_special=True)
        assert len(answer.tokens) == 6 and not answer.stopped


def test_complete_draws_and_stops(model):
    settings = {"max_new_tokens": 8, "temperature": 1.0, "top_p": 0.9, "stop_ids": ()}
    drawn, again = (qwen_jax.complete(model, [IDS], **settings)[0] for _ in range(2))
    assert drawn == again
    assert qwen_jax.complete(model, [IDS], seed=1, **settings)[0].tokens != drawn.tokens
    stop = drawn.tokens[3]
    first = drawn.tokens.index(stop)
    ended = qwen_jax.complete(model, [IDS], **settings | {"stop_ids": (stop,)})[0]
    assert ended.stopped and ended.tokens == drawn.tokens[: first + 1]


def test_complete_refuses(model):
    assert qwen_jax.complete(model, []) == []
    with pytest.raises(ValueError, match="give a list"):
        qwen_jax.complete(model, "text")
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        qwen_jax.complete(model, [IDS, []], max_new_tokens=1)
    with pytest.raises(ValueError, match="prompt 0: id 464 does not exist"):
        qwen_jax.complete(model, [[464]], max_new_tokens=1)
    with pytest.raises(ValueError, match=r"prompt 0 has 44 tokens and 5 more.*48 tokens"):
        qwen_jax.complete(model, ["x" * 44], max_new_tokens=5)
    with pytest.raises(ValueError, match="top_p"):
        qwen_jax.complete(model, [IDS], top_p=0.0)


def test_stream_equals_complete(model):
    whole = qwen_jax.complete(model, [IDS], max_new_tokens=11, stop_ids=())[0]
    pieces = list(qwen_jax.stream(model, IDS, max_new_tokens=11, stop_ids=()))
    assert [t for piece in pieces for t in piece.tokens] == whole.tokens
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [len(piece.tokens) for piece in pieces] == [1, 4, 4, 2]
    stop = whole.tokens[6]
    cut = whole.tokens[: whole.tokens.index(stop) + 1]
    pieces = list(qwen_jax.stream(model, IDS, max_new_tokens=11, stop_ids=(stop,)))
    assert [t for piece in pieces for t in piece.tokens] == cut


def test_stream_ends_with_the_context(model):
    prompt = "x" * 44
    pieces = list(api.stream(model, prompt, max_new_tokens=11, sampling=GREEDY, stop_ids=()))
    assert sum(len(piece.tokens) for piece in pieces) == 4
    with pytest.raises(ValueError, match="the prompt has 48 tokens"):
        next(api.stream(model, "x" * 48))


def test_stream_compiles_once_per_bucket(model):
    for length in (3, 20, 30):
        list(api.stream(model, [7] * length, max_new_tokens=9, stop_ids=()))
    sizes = api.begin._cache_size(), api.extend._cache_size()
    list(api.stream(model, [7] * 35, max_new_tokens=9, stop_ids=()))
    assert (api.begin._cache_size(), api.extend._cache_size()) == sizes
    list(api.stream(model, [7] * 35, max_new_tokens=10, stop_ids=()))
    assert api.begin._cache_size() == sizes[0] + 1


def test_text_comes_in_whole_characters():
    tokenizer = byte_tokenizer()
    text = "aé你🙂b"
    stream = api.TextStream(tokenizer)
    pieces = [stream.feed([token]) for token in [*tokenizer.encode(text), tokenizer.im_end]]
    assert "".join(pieces) + stream.finish() == text
    assert [piece for piece in pieces if piece] == list(text) and "" in pieces
    broken = api.TextStream(tokenizer)
    assert broken.feed(tokenizer.encode("你")[:2]) == "" and broken.finish() == "\ufffd"


def test_logits_under_dynamic_ntk_ignore_the_padding(workdir):
    """17 ids are padded to 32; alpha must come from the 17."""
    ids = list(range(17))
    one = qwen_jax.load(workdir, context=ContextConfig(16, dynamic_ntk=True))
    plain = qwen_jax.load(workdir)
    exact = api._logits(
        one.params, np.array([ids], np.int32), np.ones((1, 17), np.int32),
        cfg=one.cfg, context=one.context,
    )  # fmt: skip
    np.testing.assert_allclose(
        qwen_jax.logits(one, ids), jax.device_get(exact)[0, :, :NUM_REAL], atol=1e-4
    )
    assert np.abs(qwen_jax.logits(one, ids) - qwen_jax.logits(plain, ids)).max() > 1e-2
