"""What a sweep runs: one line or one YAML file, expanded to single runs with readable names."""

import itertools
import json
import re

import yaml

from scripts.shared.runs import AXES, SWEEP_FILE
from trainers.engine.files import write
from trainers.engine.folder import FLAGS, read_json
from trainers.flags import FREE
from trainers.optimizers.choice import OPTIMIZERS, flags_of

KEYS = ("trainer", "launcher", "flags", "optimizers", "grid")
RUN = {"trainer", "launcher", "flags", "optimizer"}
RESERVED = ("output_dir", "dry_run")


def from_line(optimizers, batch_sizes, epochs, seeds, vary):
    """The definition that one line gives; what is `None` is left to the trainer's defaults.

    Args:
        optimizers: list of names in `trainers.optimizers.choice.OPTIMIZERS`.
        batch_sizes, epochs, seeds: lists of int, or `None`.
        vary: list of strings `"FLAG=VALUE,VALUE"`.
    """
    block = {"global_batch_size": batch_sizes, "epochs": epochs, "seed": seeds}
    block = {name: values for name, values in block.items() if values is not None}
    for word in vary:
        name, sign, values = word.partition("=")
        if not sign or name in block:
            raise ValueError(f"--vary must be FLAG=VALUE,VALUE with a new flag. Received: {word}")
        try:
            block[name] = [yaml.load(value, _StrictLoader) for value in values.split(",")]
        except yaml.YAMLError:
            raise ValueError(f"--vary must be FLAG=VALUE,VALUE. Received: {word}") from None
    chosen = {OPTIMIZERS[name].title: flags_of(name) for name in optimizers}
    if len(chosen) < len(optimizers):
        raise ValueError(f"--optimizers names one twice. Received: {' '.join(optimizers)}")
    return {"optimizers": chosen, "grid": [block]}


def from_file(path):
    """The definition in a YAML file, in which no key may stand twice."""
    try:
        with open(path, encoding="utf-8") as file:
            return yaml.load(file, _StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config={path}: {error}") from None


def parse_flags(words):
    """`--name=value` words as a dict; `--name` alone is true."""
    flags = {}
    for word in words:
        name, sign, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not name.isidentifier():
            raise ValueError(f"after -- write flags as --name=value. Received: {word}")
        if name in flags:
            raise ValueError(f"after -- stands --{name} twice")
        flags[name] = value if sign else True
    return _flags("after --", flags)


def expand(definition, extra=None):
    """All runs of a definition.

    Args:
        definition: dict with keys out of `KEYS`; see `scripts.sweep`.
        extra: dict of flags of all runs; they replace those in the definition's `flags`.

    Returns:
        dict from the name of each run to its `{"optimizer", "trainer", "launcher", "flags"}`.

    Raises:
        ValueError: for anything that is not as it should be; names key and value.
    """
    definition = _mapping("the definition", definition)
    for key in definition:
        if key not in KEYS:
            raise ValueError(f"unknown key {key!r}: choose from {', '.join(KEYS)}")
    trainer = definition.get("trainer", "trainers.cifar")
    if not isinstance(trainer, str) or not re.fullmatch(r"[\w.]+", trainer):
        raise ValueError(f"trainer must be a module as trainers.cifar. Received: {trainer!r}")
    launcher = definition.get("launcher", [])
    if not isinstance(launcher, list) or not all(_is_scalar(word) for word in launcher):
        raise ValueError(f"launcher must be a list of words. Received: {launcher!r}")
    shared = {**_flags("flags", definition.get("flags", {})), **(extra or {})}
    optimizers = _mapping("optimizers", definition.get("optimizers"))
    optimizers = {str(k): _chosen(f"optimizers: {k}", v) for k, v in optimizers.items()}
    grid = definition.get("grid", [{}])
    if not optimizers or not isinstance(grid, list) or not grid:
        key = "grid" if optimizers else "optimizers"
        raise ValueError(f"{key} must not be empty. Received: {definition.get(key)!r}")

    runs, origins = {}, {}
    for number, block in enumerate(grid):
        where = f"grid[{number}]"
        block = {k: _values(f"{where}: {k}", v) for k, v in _mapping(where, block).items()}
        names = [str(name) for name in block.pop("optimizers", optimizers)]
        if unknown := set(names) - set(optimizers):
            raise ValueError(f"{where}: optimizers does not define {', '.join(sorted(unknown))}")
        _flags(where, {key: values[0] for key, values in block.items()})
        _check_disjoint(where, block, "after --", extra or {})
        # The optimizers change fastest: a sweep half done has something to compare.
        for values in itertools.product(*block.values()):
            point = dict(zip(block, values))
            for optimizer in names:
                own = optimizers[optimizer]
                _check_disjoint(f"optimizers: {optimizer}", own, where, block)
                _check_disjoint(f"optimizers: {optimizer}", own, "after --", extra or {})
                flags = {**shared, **own, **point}
                name = _name(optimizer, flags, block)
                if name in runs:
                    raise ValueError(f"two runs are named {name}: in {origins[name]} and {where}")
                origins[name] = where
                runs[name] = {
                    "optimizer": optimizer,
                    "trainer": trainer,
                    "launcher": [str(word) for word in launcher],
                    "flags": flags,
                }
    return runs


def _chosen(where, value):
    """The flags of an optimizer: those given, or those of a name in the table."""
    if isinstance(value, str):
        if value not in OPTIMIZERS:
            names = ", ".join(OPTIMIZERS)
            raise ValueError(f"{where} must be flags, or one of {names}. Received: {value!r}")
        return flags_of(value)
    return _flags(where, value)


def load(folder):
    """The runs that a sweep's folder knows, `{}` for a new one.

    Raises:
        ValueError: if its file is damaged.
    """
    file = folder / SWEEP_FILE
    if not file.exists():
        return {}
    try:
        runs = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        runs = None
    if not isinstance(runs, dict) or not all(map(_is_run, runs.values())):
        raise ValueError(f"{file} is damaged: restore it, or choose another --folder")
    return runs


def _is_run(run):
    return isinstance(run, dict) and set(run) >= RUN and isinstance(run["flags"], dict)


def save(folder, runs):
    """Adds runs to those that a sweep's folder knows, behind them: a run keeps its index.

    Raises:
        ValueError: if one of them has begun with other flags.
    """
    known = load(folder)
    for name, run in runs.items():
        description = folder / "runs" / name / FLAGS
        if name not in known or not description.exists():
            continue
        free = {*FREE, *read_json(description).get("free", [])}
        old, new = ({**r["flags"], "trainer": r["trainer"]} for r in (known[name], run))
        changed = [
            f"--{key} was {old.get(key)}, is {new.get(key)}"
            for key in {**old, **new}
            if key not in free and str(old.get(key)) != str(new.get(key))
        ]
        if changed:
            raise ValueError(
                f"the run {name} in --folder={folder} has begun with other flags: "
                f"{', '.join(changed)}. Choose another --folder"
            )
    write(folder / SWEEP_FILE, json.dumps({**known, **runs}, indent=1) + "\n")


def _text(value):
    """A flag's value as it stands in a name."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _name(optimizer, flags, block):
    parts = [optimizer]
    for key, letter in AXES.items():
        # Factor 1 is the trainer's default: the same run with and without it.
        is_default = key == "learning_rate_factor" and _text(flags.get(key)) in ("1", "1.0")
        if key in flags and not is_default:
            parts.append(letter + _text(flags[key]))
    parts += [f"{key}={_text(flags[key])}" for key in sorted(block) if key not in AXES]
    name = re.sub(r"[^\w.+=-]+", "_", "-".join(parts))
    if not name.strip(".") or len(name) > 200:
        raise ValueError(f"a run cannot have this name, a folder's: {name!r}")
    return name


def _mapping(where, value):
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a mapping. Received: {value!r}")
    return value


def _flags(where, flags):
    """Flags with single values."""
    for name, value in _mapping(where, flags).items():
        if not isinstance(name, str) or not name.isidentifier() or name in RESERVED:
            raise ValueError(f"{where}: {name!r} is not a flag that a sweep can give")
        if not _is_scalar(value):
            raise ValueError(f"{where}: {name} must have one value. Received: {value!r}")
    return flags


def _values(where, value):
    values = value if isinstance(value, list) else [value]
    if not values or not all(_is_scalar(v) for v in values):
        raise ValueError(f"{where} must be a value or a list of values. Received: {value!r}")
    return values


def _is_scalar(value):
    return isinstance(value, (str, int, float)) and value != ""


def _check_disjoint(where, flags, other, other_flags):
    for name in flags:
        if name in other_flags:
            raise ValueError(f"--{name} stands in {where} and in {other}: give it once")


class _StrictLoader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} stands twice", node.start_mark
                )
        return node


# YAML 1.1 reads 1e-4 as text.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
