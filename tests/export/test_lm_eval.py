"""lm-evaluation-harness on an exported folder: its log-likelihoods are those of our own model."""

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from sophia.export import export_model
from tests.export.small import bpe, small_model

END_OF_TEXT = 0
DOCUMENTS = [
    {"question": "thirty", "answer": " spoons", "choices": [" cups", " grüner Tee"], "label": 1},
    {"question": "if tea: drink(", "answer": "tea)", "choices": ["3", "tea"], "label": 0},
    {"question": "", "answer": "Thirty", "choices": ["T", "t", "then the cups: 33"], "label": 2},
]
TASKS = {
    "tea": ("loglikelihood", "{{question}}", "{{answer}}", "acc"),
    "tea_choice": ("multiple_choice", "{{question}}", "label", "acc"),
    "tea_rolling": ("loglikelihood_rolling", "", "{{question}}{{answer}}", "bits_per_byte"),
}


def write_tasks(folder):
    (folder / "documents.jsonl").write_text("\n".join(json.dumps(one) for one in DOCUMENTS))
    for name, (output, text, target, metric) in TASKS.items():
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "documents.jsonl")}},
            "test_split": "test",
            "output_type": output,
            "doc_to_text": text,
            "doc_to_target": target,
            "target_delimiter": "",
            "metric_list": [{"metric": metric}],
        }
        if output == "multiple_choice":
            task["doc_to_choice"] = "choices"
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML


def run_harness(model, tasks, out):
    """Run the harness without a network and without the user's caches."""
    own = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tasks / "cache"), "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("lm_eval_run.py")
    words = [sys.executable, str(script), str(model), str(tasks), str(out)]
    done = subprocess.run(words, env={**os.environ, **own}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def expected(model, context, continuation):
    """Log-likelihood of a continuation and whether it is the likeliest, from our model alone."""
    ids = bpe().encode(context + continuation).ids
    known = len(bpe().encode(context).ids)
    if not known:
        ids, known = [END_OF_TEXT, *ids], 1
    with torch.no_grad():
        scores = model(torch.tensor([ids[:-1]]))[0, known - 1 :].log_softmax(dim=-1)  # [continuation, vocab]
    targets = torch.tensor(ids[known:])
    return scores.gather(1, targets[:, None]).sum().item(), bool((scores.argmax(dim=-1) == targets).all())


@pytest.mark.skipif(
    not all(map(find_spec, ("lm_eval", "accelerate"))),
    reason="needs the extra eval: lm-eval, and accelerate for its models",
)
def test_log_likelihoods_are_those_of_our_model(tmp_path):
    model = small_model(padded_vocab_size=320, attention_scale_by_layer=True)
    export_model(model, bpe(), tmp_path / "out", end_of_text=END_OF_TEXT, check=False)
    write_tasks(tmp_path)
    answer = run_harness(tmp_path / "out", tmp_path, tmp_path / "answer.json")

    compared = 0
    for name in ("tea", "tea_choice"):
        for one in answer["samples"][name]:
            for (context, continuation), (found, greedy) in zip(one["arguments"], one["resps"], strict=True):
                likelihood, likeliest = expected(model, context, continuation)
                assert found == pytest.approx(likelihood, abs=1e-3), (context, continuation)
                assert greedy == likeliest
                compared += 1
    assert compared == len(DOCUMENTS) + sum(len(one["choices"]) for one in DOCUMENTS)

    rolling = answer["samples"]["tea_rolling"]
    texts = [one["question"] + one["answer"] for one in DOCUMENTS]
    likelihoods = [expected(model, "", text)[0] for text in texts]
    assert [one["resps"][0] for one in rolling] == pytest.approx(likelihoods, abs=1e-3)
    bits = -sum(likelihoods) / sum(len(text.encode()) for text in texts) / math.log(2)
    assert answer["results"]["tea_rolling"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
