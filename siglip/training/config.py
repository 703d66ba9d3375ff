"""TrainConfig: one frozen dataclass per concern, each living beside the code that uses it, assembled here.

A recipe is a Python file with `def get_config() -> TrainConfig` (configs/); every field is also a flag of `siglip train`:
`--batch-size`, `--optim.lr`, `--data.sources.0.weight`. Fork a recipe file, do not inherit from it.
"""

import dataclasses
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipelines import errors as data_errors
from data_pipelines.loader import DataConfig
from siglip import trees
from siglip.errors import UserError
from siglip.evaluation.suite import EvalConfig
from siglip.models.two_tower import ModelConfig
from siglip.models.variants import check_size
from siglip.parallel.launch import DistributedConfig
from siglip.parallel.sharding import MeshConfig
from siglip.training.objective import LossConfig, Term, check_terms
from siglip.training.optim import OptimConfig
from siglip.training.warm_start import InitConfig, SourceModel, read_base
from siglip.workdir.checkpoint import CheckpointConfig
from siglip.workdir.metrics import LogConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run, whole.

    Attributes:
        model: the architecture, or a SourceModel: that of `init.src`.
        total_steps: optimizer steps; the schedule ends there.
        batch_size: pairs in the global batch, over all devices and hosts.
        workdir: where everything is written.
        terms: losses beside that of the pairs, each with its weight and start (siglip.training.objective.Term); none ships.
            A term that is added has its class named in this field's type, as `tuple[Caption | Distil, ...]`.
        seed: of the parameters, of the order of the pairs and of every random choice on them.
    """

    data: DataConfig
    model: ModelConfig | SourceModel
    total_steps: int
    batch_size: int
    workdir: str
    seed: int = 0
    init: InitConfig = InitConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    loss: LossConfig = LossConfig()
    terms: tuple[Term, ...] = ()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    distributed: DistributedConfig = DistributedConfig()

    def __post_init__(self) -> None:
        for name in ("total_steps", "batch_size"):
            check_size(name, getattr(self, name), most=2**31 - 1)  # the step is an int32
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed={self.seed} must lie in [0, 2^63)")
        if self.model.text is None:
            raise UserError("model.text is None: training needs a text tower")
        check_terms(self.terms)
        if self.init.src is None:
            self._check_without_source()
        best, tasks = self.checkpoint.best_metric, self.eval.prefixes
        if best is not None and not best.startswith(tasks):
            raise UserError(
                f"checkpoint.best_metric={best!r} belongs to no evaluation task; there are {list(tasks) or 'none'}"
            )

    def _check_without_source(self) -> None:
        if isinstance(self.model, SourceModel):
            raise UserError("model is a SourceModel, that of init.src, but there is none; name one with --init.src SRC")
        if self.data.tokenizer is None:
            raise UserError("data.tokenizer is None, that of init.src, but there is none; use --data.tokenizer FILE")
        if self.init != InitConfig():
            raise UserError(
                "init.only and init.skip say what of init.src is taken, but there is none; use --init.src SRC"
            )


BAD_INPUT = (UserError, data_errors.UserError)


def resolve(config: TrainConfig) -> TrainConfig:
    """The config with its open ends filled in: a SourceModel, a tokenizer that is None, and the ~ of paths.

    The first two are what the workdir's config.json says or, in a new workdir, the source's.

    Raises:
        FileNotFoundError: there is nothing at `init.src`.
        UserError: it is not a model, has no tokenizer, or the parts do not fit each other.
    """
    config = _expand_home(config)
    model, tokenizer = config.model, config.data.tokenizer
    if isinstance(model, ModelConfig) and tokenizer is not None:
        return config
    image_size = model.image.image_size
    base, base_tokenizer, where = read_base(config.init.src, workdir=Path(config.workdir), image_size=image_size)
    if tokenizer is None:
        if base_tokenizer is None:
            raise UserError(f"{where} brings no tokenizer; name its SentencePiece model with --data.tokenizer FILE")
        tokenizer = str(base_tokenizer)
    if isinstance(model, SourceModel):
        model = model.of(base, where=where)
    return dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, tokenizer=tokenizer))


def _expand_home(value: Any) -> Any:
    """The same value; texts in it that start with ~/ are paths, and get the home folder in place of ~."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        changed = {name: new for name, old in fields.items() if (new := _expand_home(old)) != old}
        return dataclasses.replace(value, **changed) if changed else value
    if isinstance(value, tuple):
        return tuple(map(_expand_home, value))
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The config as plain JSON values; `from_json` inverts it."""
    return dataclasses.asdict(config)


def from_json(tree: Mapping[str, Any], *, where: str = "config") -> TrainConfig:
    """Raises UserError for unknown fields of the file `where`, with a suggestion."""
    return trees.build_dataclass(TrainConfig, tree, where=where)


def load_config_file(path: str) -> TrainConfig:
    """Runs a recipe file and returns what its `get_config()` returns.

    Raises:
        FileNotFoundError: if there is no such file.
        UserError: if it defines no `get_config`, or that does not return a TrainConfig.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"config file {path} does not exist; give a Python file such as configs/quickstart.py")
    spec = importlib.util.spec_from_file_location(f"siglip_recipe_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"config file {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        if "get_config" not in vars(module):
            raise UserError("it defines no get_config(); add `def get_config() -> TrainConfig`")
        config = module.get_config()
    except Exception as error:  # a recipe is a user's file: whatever it raises is told in one line
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        where = f", line {lines[-1]}" if lines else ""
        raise UserError(f"config file {path}{where}: {error}{_suggest_field(error, vars(module))}") from error
    if not isinstance(config, TrainConfig):
        raise UserError(f"get_config() of {path} returned {type(config).__name__}; it must return a TrainConfig")
    return config


def _suggest_field(error: Exception, recipe: Mapping[str, Any]) -> str:
    """For "… got an unexpected keyword argument 'lrr'" the closest field of the dataclasses that the recipe uses."""
    match = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    used = [cls for cls in recipe.values() if dataclasses.is_dataclass(cls)]
    return "" if match is None else trees.did_you_mean(match[1], {f.name for c in used for f in dataclasses.fields(c)})
