"""A run folder with two checkpoints, as `sophia train` leaves it, written without training."""

import dataclasses

import torch

from sophia import checkpoint
from sophia.config import EvaluationSettings, TrainSettings, write_toml
from sophia.data.shards import write_dataset
from sophia.run import RunFolder
from tests.export.small import TEXT, bpe, small_model

STEPS = (10, 20)
END_OF_TEXT = 0


def model_at(step):
    """The model of a checkpoint; the one of step 20 has other weights than that of step 10."""
    model = small_model(padded_vocab_size=320)
    with torch.no_grad():
        model.final_norm.weight.mul_(step / 40)
    return model


def write_data(folder, *, tokenizer=None):
    tokenizer = tokenizer or bpe()
    document = tokenizer.encode(TEXT).ids
    return write_dataset(folder, tokenizer, train=[document], validation=[document[:200], document[300:600]])


def write_run(folder, data):
    run = RunFolder(folder)
    folder.mkdir()
    settings = TrainSettings(data=data, out=folder, evaluation=EvaluationSettings(eval_windows=5))
    write_toml(settings, run.config)
    bpe().save(str(run.tokenizer))
    for step in STEPS:
        model = model_at(step)
        weights = {name: tensor for name, tensor in model.state_dict().items() if name != "head.weight"}
        state = {"model": dataclasses.asdict(model.config), "end_of_text": END_OF_TEXT}
        checkpoint.write(
            run.checkpoints,
            checkpoint.Checkpoint(step=step, model=weights, optimizer={"x": torch.zeros(1)}, state=state),
        )
    return folder
