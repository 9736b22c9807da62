"""The study file: what it says is what is read, and every mistake is one line that names it."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from sophia.cli import main
from sophia.config import OptimizerSettings
from sophia.study import check
from sophia.study.plan import plan
from sophia.study.read import DEFAULT, frozen, read_study
from sophia.study.runs import settings
from tests.study.simulated import simulate

RACE = """
[race]
tokens = 81920
tokens_per_step = 2048
"""
ADAMW = """
[[optimizer]]
optimizer = "adamw"
lr = 8e-3
"""
SOPHIA = """
[[optimizer]]
name = "sophia"
optimizer = "sophia-g"
lr = 2e-3
gamma = 0.5
search = {gamma = [0.1, 0.5], curvature_noise = ["labels", "signs"]}
"""
SIGNS = """
[[ablation]]
name = "signs"
of = "sophia"
curvature_noise = "signs"
lr_factors = [1, 2]
"""
HEAD = 'name = "short"\n'
GOOD = HEAD + RACE + ADAMW + SOPHIA + SIGNS


@pytest.fixture
def read(tmp_path):
    def from_text(text):
        path = tmp_path / "study.toml"
        path.write_text(text, encoding="utf-8")
        return read_study(path)

    return from_text


def test_what_it_says_is_what_is_read(read):
    study = read(GOOD)
    adamw, sophia = study.optimizers
    assert (study.name, adamw.name, sophia.name, sophia.optimizer) == ("short", "adamw", "sophia", "sophia-g")
    assert study.race.tokens == 81920
    assert adamw.search == ()
    assert sophia.lr == 2e-3
    assert sophia.search == (("gamma", (0.1, 0.5)), ("curvature_noise", ("labels", "signs")))
    (signs,) = study.ablations
    assert (signs.of, signs.settings, signs.lr_factors) == ("sophia", settings(curvature_noise="signs"), (1.0, 2.0))


def test_runs_carry_what_the_preset_decides_and_where_a_search_begins(read):
    adamw, sophia = read(GOOD).optimizers
    assert adamw.settings == settings(beta1=0.9, beta2=0.95, weight_decay=0.1)
    assert dict(sophia.settings)["curvature_noise"] == "labels"
    assert dict(sophia.settings)["gamma"] == 0.5
    assert "lr" not in dict(adamw.settings)


def test_the_recipe_is_that_which_the_entry_asks_for(read):
    paper = read(
        HEAD + RACE + ADAMW + '[[optimizer]]\noptimizer = "sophia-g"\nrecipe = "paper"\nlr = 1e-3\n'
    ).optimizers[1]
    assert {"beta1": 0.96, "gamma": 0.05}.items() <= dict(paper.settings).items()
    # What depends on the batch stays open.
    assert "curvature_rows" not in dict(paper.settings)


def test_a_searched_setting_starts_from_what_the_trainer_would_take(read):
    (_, entry) = read(HEAD + RACE + ADAMW + SOPHIA.replace("gamma = [", "curvature_rows = [8], gamma = [")).optimizers
    assert dict(entry.settings)["curvature_rows"] == 4


def test_whole_numbers_and_fractions_are_the_same_run(read):
    ours = [read(HEAD + RACE + ADAMW + f"weight_decay = {text}\n") for text in ("1", "1.0", "1e0")]
    assert len({plan(study, {}).wanted[0].id for study in ours}) == 1


def test_a_tenth_of_the_budget_is_a_tenth(read):
    study = read(with_race("baseline_budgets = [0.1, 0.7, 1]\nevaluations = 2", text=GOOD))
    assert [study.race.steps(budget, 2048) for budget in study.race.baseline_budgets] == [4, 28, 40]


def test_lists_from_json_are_the_same_settings():
    assert settings(decay_by_name=["a=0"], lr=1.0) == settings(lr=1.0, decay_by_name=("a=0",))


def test_paths_begin_where_the_file_stands(read, tmp_path):
    data = f'[data]\nfolder = "corpus"\ntext = "books"\nsha256 = "{"a" * 64}"\n'
    assert read(HEAD + data + RACE + ADAMW).data.folder == tmp_path / "corpus"
    assert read(HEAD + RACE + ADAMW).data.folder is None


def test_lists_of_names_are_settings_too(read):
    study = read(HEAD + RACE + ADAMW + 'decay_by_name = ["tokens.*=0"]\nsearch = {decay_by_name = [[], ["*=0.1"]]}\n')
    (entry,) = study.optimizers
    assert dict(entry.settings)["decay_by_name"] == ("tokens.*=0",)
    assert entry.search == (("decay_by_name", ((), ("*=0.1",))),)
    json.dumps(frozen(study))
    assert len(simulate(study, lambda spec: 3.0)) > 8


def test_the_built_in_study_is_whole():
    study = read_study(None)
    assert study == read_study(DEFAULT)
    assert {entry.optimizer for entry in study.optimizers} == {"adamw", "sophia-g", "muon", "lion"}
    assert study.data.folder is None
    assert (study.race.headline, len(study.race.seeds)) == ("sophia-g", 3)
    assert study.race.warmup_fraction == 0.5
    # What two cores do in half an hour to forty minutes, at 13 thousand tokens a second each.
    assert 25 * 60 < plan(study, {}).tokens_left / 26_000 < 35 * 60


def test_studies_of_the_repository_can_be_read():
    folder = Path(__file__).parents[2] / "benchmarks" / "studies"
    for path in folder.glob("*.toml"):
        assert read_study(path).name == path.stem


def changed(old, new, *, text=GOOD):
    assert old in text
    return text.replace(old, new)


def with_race(line, *, text=GOOD):
    return text.replace("[race]\n", f"[race]\n{line}\n")


def matrices(text):
    """A study with Sophia-K."""
    return f'{GOOD}\n[[optimizer]]\noptimizer = "sophia-k"\nlr = 8e-3\n{text}\n'


MISTAKES = [
    # The file.
    ("[race\n", ["is not a TOML file"]),
    (GOOD.replace(HEAD, ""), ["no name"]),
    (changed('"short"', '"a/b"'), ["study: the name 'a/b' must consist of letters"]),
    (HEAD + ADAMW, ["no table [race]"]),
    (HEAD + "[race]\ntokens = 2048\n" + ADAMW, ["no tokens_per_step in [race]"]),
    (HEAD + "optimizer = 3\n" + RACE, ["write [[optimizer]]"]),
    (HEAD + RACE + ADAMW.replace("[[optimizer]]", "[optimizer]"), ["write [[optimizer]]"]),
    (HEAD + RACE + ADAMW + "[ablation]\nname = 'x'\n", ["write [[ablation]]"]),
    (HEAD + "[optimiser]\nlr = 1\n" + RACE, ["unknown key optimiser (did you mean optimizer?)"]),
    (HEAD + "budget = 4\n" + RACE + ADAMW, ["unknown key budget"]),
    (with_race("token_per_step = 3"), ["unknown key token_per_step in [race] (did you mean tokens_per_step?)"]),
    (with_race("width = 3"), ["width belongs into the table [model]"]),
    (GOOD + "[model]\nmodel = 'nanu'\n", ["model 'nanu' is not a preset; did you mean nano?"]),
    (GOOD + "[model]\nheads = 3\n", ["width 128", "heads 3"]),
    (GOOD + "[model]\nlayers = 0\n", ["layers is 0"]),
    (GOOD + "[machine]\nprecision = 'fp8'\n", ["machine.precision is 'fp8'", "'fp32'"]),
    (GOOD + "[data]\nfolder = 'x'\n", ["no text: say where"]),
    (GOOD + "[data]\nfolder = 'x'\ntext = 'books'\n", ["no sha256"]),
    (GOOD + "[data]\nfolder = 'x'\ntext = 'books'\nsha256 = '12'\n", ["data.sha256 is '12'", "64 hexadecimal"]),
    # The race.
    (changed("tokens = 81920", "tokens = '1M'"), ["race.tokens is '1M'; it must be a whole number"]),
    (changed("tokens = 81920", "tokens = 0"), ["race.tokens is 0; it must be at least 1"]),
    (changed("tokens = 81920", "tokens = 1024"), ["race.tokens is 1024", "smaller than a step", "fits", "is 4096"]),
    (changed("tokens = 81920", "tokens = 82000"), ["no whole number of steps of 2048", "is 81920"]),
    (changed("tokens = 81920", "tokens = 83968"), ["the budget of 0.5 of it is no whole number", "is 81920"]),
    (with_race("other_batches = [3072]"), ["no whole number of steps of 3072", "is 86016"]),
    (with_race("other_batches = [3000]"), ["3000 is not a multiple of the context 128", "example 2944"]),
    (with_race("other_batches = [2048]"), ["other_batches holds 2048 twice"]),
    (changed("tokens_per_step = 2048", "tokens_per_step = 0"), ["race.tokens_per_step is 0; it must be at least 1"]),
    (with_race("baseline_budgets = [0.5, 2]"), ["baseline_budgets is [0.5, 2.0] without 1.0"]),
    (with_race("headline_budgets = [0.5]"), ["headline_budgets is [0.5] without 1.0"]),
    (with_race("baseline_budgets = [1, 1.0]"), ["baseline_budgets holds 1.0 twice"]),
    (with_race("baseline_budgets = [1, -1]"), ["baseline_budgets holds -1.0"]),
    (with_race("baseline_budgets = [1, inf]"), ["baseline_budgets holds inf"]),
    (with_race("seeds = []"), ["race.seeds is empty"]),
    (with_race("seeds = [0, 1]"), ["race.seeds holds 0, the search_seed"]),
    (with_race("search_budget = 0"), ["race.search_budget is 0.0; it must be above 0 and at most 1"]),
    (with_race("search_budget = 0.0001"), ["the budget of 0.0001 of it is"]),
    (with_race("search_seed = 2"), ["race.seeds holds 2, the search_seed"]),
    (with_race("seeds = [1, 1]"), ["race.seeds holds 1 twice"]),
    (with_race("seeds = [-1]"), ["race.seeds holds -1"]),
    (with_race("seeds = [1.5]"), ["race.seeds is 1.5; it must be a whole number"]),
    (with_race("headline = 'sophia'\nheadline_seeds = [1, 2]"), ["headline_seeds is [1, 2] without 3"]),
    (with_race("headline = 'sophia'\nheadline_seeds = [0, 1, 2, 3]"), ["headline_seeds holds 0"]),
    (with_race("headline_seeds = [1, 2, 3]"), ["headline_seeds is given without race.headline"]),
    (with_race("headline = 'sofia'"), ["headline is 'sofia'", "adamw, sophia", "did you mean sophia?"]),
    (with_race("headline = 'adamw'"), ["the baseline itself"]),
    (with_race("baseline = 'adam'"), ["race.baseline is 'adam'", "did you mean adamw?"]),
    (with_race("trials = 2"), ["race.trials is 2; it must be at least 3"]),
    (with_race("retrials = -1"), ["race.retrials is -1; it must be at least 1, or 0"]),
    (with_race("factor = 1"), ["race.factor is 1.0; it must be at least 1.1"]),
    (with_race("factor = 0.5"), ["race.factor is 0.5"]),
    (with_race("factor = nan"), ["race.factor is nan"]),
    (with_race("warmup_fraction = 1"), ["race.warmup_fraction is 1.0; it must be at least 0 and below 1"]),
    (with_race("warmup_fraction = -0.1"), ["race.warmup_fraction is -0.1"]),
    (with_race("warmup_fraction = 0.99"), ["a run of 0.5 T has 20 steps", "does not fit"]),
    (with_race("schedule = 'wsd'\nwarmup_fraction = 0.9"), ["a run of 0.5 T", "decay"]),
    (with_race("schedule = 'cos'"), ["race.schedule is 'cos'", "'cosine'"]),
    (with_race("final_lr_fraction = 1.5"), ["race.final_lr_fraction is 1.5"]),
    (with_race("max_grad_norm = -1"), ["race.max_grad_norm is -1.0"]),
    (with_race("evaluations = 0"), ["race.evaluations is 0"]),
    (with_race("evaluations = 21"), ["has 20 steps", "fewer than its 21 evaluations"]),
    (with_race("eval_windows = 0"), ["race.eval_windows is 0"]),
    # Optimizers.
    (HEAD + RACE, ["no optimizer: write [[optimizer]]"]),
    (HEAD + RACE + "[[optimizer]]\nlr = 1\n", ["optimizer number 1 names none"]),
    (changed('"adamw"', '"adam"'), ["optimizer adam: unknown optimizer 'adam' (did you mean adamw?)"]),
    (changed('"adamw"', '"torch.optim.Adam"'), ["unknown optimizer 'torch.optim.Adam'", "package.module:Class"]),
    (changed("lr = 8e-3\n", ""), ["optimizer adamw: no lr: write lr"]),
    (changed("lr = 8e-3", "lr = 'high'"), ["optimizer adamw: lr is 'high'; it must be a number"]),
    (changed("lr = 8e-3", "lr = 0"), ["optimizer adamw: lr is 0.0; it must be finite and above 0"]),
    (changed("lr = 8e-3", "lr = nan"), ["optimizer adamw: lr is nan"]),
    (changed("lr = 8e-3", "lr = 8e-3\nbeta1 = 1.0"), ["optimizer adamw: beta1 is 1.0; it must be at least 0"]),
    (changed("lr = 8e-3", "lr = 8e-3\nbeta1 = '0'"), ["optimizer adamw: beta1 is '0'; it must be a number"]),
    (changed("lr = 8e-3", "lr = 8e-3\nbeta_1 = 1"), ["optimizer adamw: unknown key beta_1 (did you mean beta1?)"]),
    (changed("lr = 8e-3", "lr = 8e-3\nserach = {}"), ["unknown key serach (did you mean search?)"]),
    (changed("lr = 8e-3", "lr = 8e-3\nsteps = 10"), ["optimizer adamw: unknown key steps"]),
    (changed("lr = 8e-3", "lr = 8e-3\nmax_grad_norm = 2.0"), ["max_grad_norm cannot stand here", "[race]"]),
    (changed("lr = 8e-3", "lr = 8e-3\ngamma = 0.1"), ["optimizer adamw: gamma has no meaning for adamw"]),
    (changed("lr = 8e-3", "lr = 8e-3\ncurvature_interval = 10"), ["curvature_interval has no meaning for adamw"]),
    (
        changed("lr = 8e-3", "lr = 8e-3\nhook = 'x'"),
        ["optimizer adamw: hook is 'x'; it must be package.module:function"],
    ),
    (changed("gamma = 0.5", "gamma = -1"), ["optimizer sophia: gamma is -1.0"]),
    (changed("gamma = 0.5", "curvature_rows = 17"), ["curvature_rows is 17, but a step has 16 sequences"]),
    (
        with_race("other_batches=[1024]\nheadline = 'sophia'", text=changed("gamma = 0.5", "curvature_rows = 9")),
        ["a step has 8 sequences"],
    ),
    (changed('name = "sophia"', 'name = "adamw"'), ["optimizer: name holds 'adamw' twice"]),
    (changed('name = "sophia"', 'name = ""'), ["optimizer: the name '' must consist"]),
    (changed('name = "sophia"', "name = 3"), ["optimizer number 2: name is 3; it must be a text"]),
    (changed("search = {", "search = [1]\n#"), ["optimizer sophia: search is [1]; it must be a table of lists"]),
    (changed("gamma = [0.1, 0.5]", "gamma = 0.1"), ["search.gamma is 0.1; it must be a list"]),
    (changed("gamma = [0.1, 0.5]", "gamma = []"), ["search.gamma is []; it must be a list"]),
    (changed("gamma = [0.1, 0.5]", "gamma = [1, 1.0]"), ["search.gamma holds 1.0 twice"]),
    (changed("gamma = [0.1, 0.5]", "gamma = [0.5]"), ["search.gamma holds nothing but 0.5, which it is"]),
    (changed("gamma = [0.1, 0.5]", "gamma = [0.5, 0]"), ["optimizer sophia: search: gamma is 0.0"]),
    (changed("gamma = [0.1, 0.5]", "gamma = ['x', 1]"), ["search.gamma is 'x'"]),
    (changed("gamma = [0.1, 0.5]", "gama = [1]"), ["search: unknown key gama (did you mean gamma?)"]),
    (changed("gamma = [0.1, 0.5]", "lr = [1]"), ["search: lr cannot stand here: it is searched always"]),
    (changed("lr = 8e-3", "lr = 8e-3\nsearch = {gamma = [1]}"), ["gamma has no meaning for adamw"]),
    (changed("gamma = [0.1, 0.5]", "recipe = ['paper']"), ["optimizer sophia: search: recipe cannot stand here"]),
    # Sophia-K's.
    (changed("gamma = 0.5", 'basis = "both"'), ["basis has no meaning for sophia-g: leave it out, or choose sophia-k"]),
    (matrices('basis = "left"'), ["optimizer sophia-k: basis is 'left'; it must be 'both', 'smaller', 'none'"]),
    (matrices("gamma = 'auto'"), ["optimizer sophia-k: gamma is auto", "give a number"]),
    (matrices("clip = 1"), ["optimizer sophia-k: clip is 1; it must be true or false"]),
    (matrices('recipe = "paper"'), ["recipe is paper, which has no settings for sophia-k"]),
    (matrices("search = {exponent = [0.5, -1]}"), ["optimizer sophia-k: search: exponent is -1.0"]),
    (matrices("search = {orthogonalize = [5]}"), ["search.orthogonalize holds nothing but 5, which it is"]),
    (matrices("search = {orthogonalize = [0, -5]}"), ["optimizer sophia-k: search: orthogonalize is -5"]),
    (matrices("search = {clip_target = [0.5]}"), ["clip_target has no meaning for sophia-k"]),
    (matrices("curvature_rows = 2\ncurvature_chunks = 4"), ["curvature_chunks is 4, more than the 2 curvature_rows"]),
    # Ablations.
    (changed('curvature_noise = "signs"', 'recipe = "paper"'), ["ablation signs: recipe cannot stand here"]),
    (changed('name = "signs"\n', ""), ["ablation number 1: no name"]),
    (changed('of = "sophia"\n', ""), ["ablation number 1: no of"]),
    (changed('of = "sophia"', 'of = "sofia"'), ["ablation signs: of is 'sofia'", "did you mean sophia?"]),
    (changed('name = "signs"', 'name = "adamw"'), ["ablation adamw has the name of an optimizer"]),
    (GOOD + SIGNS, ["ablation: name holds 'signs' twice"]),
    (changed('curvature_noise = "signs"', "gamma = 0.5"), ["ablation signs changes nothing of sophia"]),
    (changed('curvature_noise = "signs"', 'curvature_noise = "labels"'), ["ablation signs changes nothing of sophia"]),
    (changed('curvature_noise = "signs"', "curvature_interval = 10"), ["ablation signs changes nothing of sophia"]),
    (changed('curvature_noise = "signs"', "eps = 1e-12"), ["ablation signs changes nothing of sophia"]),
    (changed('curvature_noise = "signs"', ""), ["ablation signs changes nothing of sophia"]),
    (changed('curvature_noise = "signs"', "basis_interval = 3"), ["ablation signs: basis_interval has no meaning"]),
    (changed('curvature_noise = "signs"', "beta2 = 2.0"), ["ablation signs: beta2 is 2.0"]),
    (changed('curvature_noise = "signs"', "lr = 2.0"), ["ablation signs: lr cannot stand here: write lr_factors"]),
    (changed("[1, 2]", "[1, -1]"), ["ablation signs: lr_factors holds -1.0"]),
    (changed("[1, 2]", "[2, 2]"), ["ablation signs: lr_factors holds 2.0 twice"]),
    (changed("[1, 2]", "2"), ["ablation signs: lr_factors is 2"]),
]


@pytest.mark.parametrize(("text", "parts"), MISTAKES, ids=[parts[0][:60] for _, parts in MISTAKES])
def test_a_mistake_is_one_line_that_names_it(read, text, parts):
    with pytest.raises(ValueError, match=r"study\.toml") as caught:
        read(text)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    if "not a TOML file" not in message:
        assert "\n" not in message
        assert len(message) < 300


def test_a_file_that_is_not_there_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.toml does not exist: give the TOML file of a study"):
        read_study(tmp_path / "nothing.toml")
    with pytest.raises(ValueError, match="is a folder: give the TOML file of a study"):
        read_study(tmp_path)


def test_an_import_path_is_an_optimizer(read):
    check.optimizer("torch.optim:Adagrad", "optimizer x")
    for text in ("torch.optim.Adagrad", "torch:", ":Adagrad", "a b:C", "a:1"):
        with pytest.raises(ValueError, match="unknown optimizer"):
            check.optimizer(text, "optimizer x")


def test_every_setting_of_the_trainer_can_be_studied():
    names = {one.name for one in dataclasses.fields(OptimizerSettings)}
    assert names - set(check.SETTINGS) <= {"optimizer", "lr", "hook"}


def test_what_is_frozen_is_the_race_and_its_baseline(read):
    before = frozen(read(GOOD))
    assert json.loads(json.dumps(before)) == before
    for free in (
        changed("lr = 2e-3", "lr = 1e-3"),
        HEAD + RACE + ADAMW,
        GOOD + ADAMW.replace("[[optimizer]]", '[[optimizer]]\nname = "b"'),
        changed("short", "long"),
        GOOD + '[data]\ntokenizer = "bytes"\n',
        GOOD + '[machine]\ndevice = "cpu"\n',
    ):
        assert frozen(read(free)) == before, free
    for key, bound in {
        "race.trials": with_race("trials = 9"),
        "race.seeds": with_race("seeds = [1, 2]"),
        "race.tokens": changed("tokens = 81920", "tokens = 163840"),
        "race.headline": with_race("headline = 'sophia'"),
        "baseline.lr": changed("lr = 8e-3", "lr = 4e-3"),
        "baseline.settings": changed("lr = 8e-3", "lr = 8e-3\nweight_decay = 0.2"),
        "baseline.search": changed("lr = 8e-3", "lr = 8e-3\nsearch = {beta2 = [0.9]}"),
        "model.width": GOOD + "[model]\nwidth = 64\n",
        "machine.precision": GOOD + "[machine]\nprecision = 'bf16'\n",
    }.items():
        table, name = re.split(r"\.", key)
        after = frozen(read(bound))
        assert after[table].get(name) != before[table].get(name), key
        # Nothing else than what was changed.
        after[table][name] = before[table].get(name)
        assert {k: v for k, v in after[table].items() if v is not None} == before[table], key


def test_the_command_ends_with_the_line(tmp_path, capsys):
    path = tmp_path / "study.toml"
    path.write_text(changed("lr = 8e-3\n", ""), encoding="utf-8")
    assert main(["compare", str(path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("sophia: study.toml: optimizer adamw: no lr")


def test_rows_are_asked_of_the_batches_where_an_entry_runs(read):
    """Ablations run at the common batch alone, of 16 sequences here; one of 8 is the headline pair's."""
    batches = RACE + 'headline = "sophia"\nother_batches = [1024]\n'
    rows = '[[ablation]]\nname = "all rows"\nof = "sophia"\ncurvature_rows = 16\n'
    assert read(HEAD + batches + ADAMW + SOPHIA + rows).ablations[0].settings == settings(curvature_rows=16)
    with pytest.raises(ValueError, match="curvature_rows is 16, but a step has 8 sequences"):
        read(HEAD + batches + ADAMW + SOPHIA.replace("gamma = 0.5", "gamma = 0.5\ncurvature_rows = 16"))
    read(
        HEAD
        + batches.replace("sophia", "adamw2")
        + ADAMW
        + ADAMW.replace("adamw", "adamw", 1).replace("lr = 8e-3", 'lr = 8e-3\nname = "adamw2"')
        + SOPHIA.replace("gamma = 0.5", "gamma = 0.5\ncurvature_rows = 16")
    )
