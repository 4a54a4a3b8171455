"""Generated calls of all public names: each must return, or raise an error of jensen that names an argument.

A call has valid values for most arguments, and random unsuitable values for a few. An exception must come from a
``raise`` statement of the library, have one line, and a type that the library documents. Everything else (an error of
torch, Pyro or NumPy, an AttributeError, a call that does not end) is a failure.
"""

import ast
import contextlib
import functools
import importlib
import inspect
import io
import linecache
import math
import random
import re
import signal
import tempfile
import traceback
import typing
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyro
import torch
from torch import nn

ROOMS = ("inference", "models", "guides", "families", "datasets", "plots", "networks")
OWN = (ValueError, TypeError, FloatingPointError, NotImplementedError)
SECONDS = 20  # that a call may take

_LIBRARY = str(Path(importlib.import_module("jensen.kernel").__file__).parent.parent)
_PATH = Path("/dev/null/nowhere")


_ROLES = {
    "data",
    "datum",
    "x",
    "h",
    "sequences",
    "site",
    "latents",
    "posterior",
    "model",
    "guide",
    "pair",
    "array",
    "context",
}


class _Slow(BaseException):
    """A call took too long."""


def _wrong_arity():
    return None


def _returns_text(*_, **__):
    return "text"


def _raises(*_, **__):
    raise KeyError("of the user's own")


POOL = {
    "None": lambda: None,
    "True": lambda: True,
    "False": lambda: False,
    "0": lambda: 0,
    "-1": lambda: -1,
    "1": lambda: 1,
    "2**31": lambda: 2**31,
    "2**70": lambda: 2**70,
    "-2**70": lambda: -(2**70),
    "0.0": lambda: 0.0,
    "0.5": lambda: 0.5,
    "2.0": lambda: 2.0,
    "-1.5": lambda: -1.5,
    "nan": lambda: math.nan,
    "inf": lambda: math.inf,
    "-inf": lambda: -math.inf,
    "1e400 as int": lambda: 10**400,
    "1j": lambda: 1j,
    "''": lambda: "",
    "'text'": lambda: "text",
    "'z'": lambda: "z",
    "'cuda:99'": lambda: "cuda:99",
    "'meta'": lambda: "meta",
    "'nowhere:0'": lambda: "nowhere:0",
    "'7'": lambda: "7",
    "b'bytes'": lambda: b"bytes",
    "[]": list,
    "[1, 'a']": lambda: [1, "a"],
    "[3, 4]": lambda: [3, 4],
    "()": tuple,
    "(1, 2)": lambda: (1, 2),
    "(0.5, -1)": lambda: (0.5, -1),
    "(tensor, 3)": lambda: (torch.randn(6, 4), 3),
    "(tensor, None)": lambda: (torch.randn(6, 4), None),
    "(tensor, other length)": lambda: (torch.randn(6, 4), torch.randn(5)),
    "(tensor, scalar)": lambda: (torch.randn(6, 4), torch.tensor(0.5)),
    "(tensor, tensor)": lambda: (torch.randn(6, 4), torch.randn(6, 4)),
    "[tensor]": lambda: [torch.randn(6, 4)],
    "{}": dict,
    "{1: 2}": lambda: {1: 2},
    "{'z': 3}": lambda: {"z": 3},
    "{'z': 'text'}": lambda: {"z": "text"},
    "{None: tensor}": lambda: {None: torch.randn(6, 2)},
    "{'z': tensor}": lambda: {"z": torch.randn(6, 2)},
    "{'z': nan}": lambda: {"z": torch.full((2, 6, 2), math.nan)},
    "{'z': integers}": lambda: {"z": torch.ones(2, 6, 2).long()},
    "{'a': (1, 2)}": lambda: {"a": (1, 2)},
    "{'a': None}": lambda: {"a": None},
    "set()": set,
    "{'z'}": lambda: {"z"},
    "range(3)": lambda: range(3),
    "object()": object,
    "a generator": lambda: (i for i in range(2)),
    "Ellipsis": lambda: ...,
    "int": lambda: int,
    "nn.Linear": lambda: nn.Linear,
    "nn.Linear(4, 3)": lambda: nn.Linear(4, 3),
    "nn.Linear(3, 3)": lambda: nn.Linear(3, 3),
    "nn.Identity()": nn.Identity,
    "nn.Module()": nn.Module,
    "wrong arity": lambda: _wrong_arity,
    "returns text": lambda: _returns_text,
    "raises": lambda: _raises,
    "array [6, 4]": lambda: np.random.default_rng(0).normal(size=(6, 4)),
    "array float32": lambda: np.zeros((6, 4), np.float32),
    "array of objects": lambda: np.array([None, "a"], object),
    "array of text": lambda: np.array(["a", "b"]),
    "array of dates": lambda: np.array(["2020-01-01"], "datetime64[D]"),
    "array 0-dim": lambda: np.array(3.0),
    "array empty": lambda: np.zeros((0, 4)),
    "np.int64(3)": lambda: np.int64(3),
    "np.float32(0.5)": lambda: np.float32(0.5),
    "np.bool_": lambda: np.bool_(True),
    "randn [6, 4]": lambda: torch.randn(6, 4),
    "randn [6, 3]": lambda: torch.randn(6, 3),
    "randn [2, 6, 2]": lambda: torch.randn(2, 6, 2),
    "randn [4]": lambda: torch.randn(4),
    "float64": lambda: torch.randn(6, 4).double(),
    "float16": lambda: torch.randn(6, 4).half(),
    "bfloat16": lambda: torch.randn(6, 4).bfloat16(),
    "complex": lambda: torch.randn(6, 4, dtype=torch.complex64),
    "integers": lambda: torch.arange(24).reshape(6, 4),
    "bytes": lambda: torch.arange(24, dtype=torch.uint8).reshape(6, 4),
    "bools": lambda: torch.ones(6, 4).bool(),
    "meta": lambda: torch.randn(6, 4, device="meta"),
    "sparse": lambda: torch.eye(6, 4).to_sparse(),
    "empty [0, 4]": lambda: torch.zeros(0, 4),
    "empty [6, 0]": lambda: torch.zeros(6, 0),
    "scalar": lambda: torch.tensor(0.5),
    "integer scalar": lambda: torch.tensor(3),
    "bool scalar": lambda: torch.tensor(True),
    "nan [6, 4]": lambda: torch.full((6, 4), math.nan),
    "one nan": lambda: torch.randn(6, 4).index_fill(0, torch.tensor([2]), math.nan),
    "inf [6, 4]": lambda: torch.full((6, 4), math.inf),
    "large [6, 4]": lambda: torch.full((6, 4), 1e30),
    "with gradient": lambda: torch.randn(6, 4, requires_grad=True),
    "parameter": lambda: nn.Parameter(torch.randn(6, 4)),
    "torch.float32": lambda: torch.float32,
    "torch.int64": lambda: torch.int64,
    "device": lambda: torch.device("cpu"),
    "device meta": lambda: torch.device("meta"),
    "a path": lambda: _PATH,
    "a distribution": lambda: torch.distributions.Normal(0.0, 1.0),
    "a PyroModule": lambda: pyro.nn.PyroModule(),
    "an object": lambda: SimpleNamespace(latents={"z": (2,)}),
}


class World:
    """Valid values, made once: a model and guide, data, results."""

    def __init__(self):
        from jensen import families, guides, inference, models, networks

        torch.manual_seed(0)
        self.x = torch.randn(6, 4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._make(families, guides, inference, models, networks)

    def _make(self, families, guides, inference, models, networks):
        self.models, self.guides, self.families, self.networks = models, guides, families, networks
        self.inference = inference
        model, guide = self.pair()
        quiet = {"progress": False, "seed": 0}
        self.history = inference.fit(model, guide, self.x, epochs=2, validation=self.x, **quiet)
        self.evidence = inference.evaluate(model, guide, self.x, 8, **quiet)
        self.bounds = inference.bounds(model, guide, self.x, 4, **quiet)
        self.gaps = inference.gaps(model, guide, self.x, 8, rounds=1, steps=2, **quiet)
        self.rate = inference.rate_distortion(model, guide, self.x, 4, **quiet)
        self.rates = inference.learning_rates(model, guide, self.x, steps=10, **quiet)
        self.calibration = inference.calibrate(model, guide, 100, 19, **quiet)
        self.signal = inference.gradient_signal(model, guide, self.x, inference.ELBO(2), repeats=3, seed=0)
        self.posterior = inference.mcmc_posterior(model, self.x[:1], draws=4, warmup=1, chains=1, **quiet)
        self.terms = inference.terms(model, guide, self.x, particles=2)

    def pair(self):
        """An unused model and guide."""
        model = self.models.PPCA(4, 2)
        encoder = self.networks.mlp(4, [5])
        return model, self.guides.amortize(model, encoder, self.families.MeanField, context=5)


def _axes():
    from matplotlib.figure import Figure

    return Figure().subplots()


def _suits(world, target):
    """A function that returns a valid value of an argument, small enough for a short call; None: use the default."""
    model, guide = world.pair()
    room, owner = target
    likelihood = world.families.Gaussian(4, 5)
    family = world.families.MeanField(2, 5)
    by_owner = {
        ("networks.Conditioned", "network"): nn.Linear(5, 3),
        ("networks.Masked", "network"): nn.Linear(8, 3),
        ("networks.Transposed", "layer"): nn.Linear(5, 3),
        ("networks.conv_decoder", "image"): (4, 4),
        ("networks.conv_encoder", "image"): (4, 4),
        ("networks.conv_decoder", "channels"): [3, 2],
        ("networks.conv_encoder", "channels"): [2],
        ("models.Hierarchical", "layers"): [(world.networks.mlp(2, [5]), likelihood)],
        ("models.VAE", "prior"): world.models.StandardNormal(2),
        ("models.LearnedPrior", "family"): world.families.MeanField(2, None),
        ("models.ConditionalVAE", "decoder"): world.networks.mlp(3, [5]),
        ("models.GaussianMixtureVAE", "decoder"): world.networks.mlp(2, [5]),
        ("models.VampPrior", "posterior"): guide,
        ("models.LinearGaussianSSM", "steps"): 3,
        ("guides.amortize", "family"): world.families.MeanField,
        ("guides.Structured", "family"): world.families.MeanField,
        ("guides.Structured", "data"): (world.x,),
        ("guides.BottomUp", "layers"): {"z": (world.networks.mlp(4, [5]), family)},
        ("guides.Ladder", "layers"): {"z": (world.networks.mlp(4, [5]), family)},
        ("guides.Constrained", "constraint"): torch.distributions.constraints.positive,
        ("guides.Joint", "sites"): {"z": (2,)},
        ("guides.Joint", "encoder"): world.networks.mlp(4, [5]),
        ("guides.SemiAmortized", "steps"): 2,
        ("guides.SemiAmortized", "guide"): guide,
        ("guides.SemiAmortized", "model"): model,
        ("families.Zuko", "flow"): _flow(),
        ("guides.Zuko", "flow"): _flow(),
        ("families.Family", "size"): 4,
        ("datasets.Result", "value"): 1.0,
        ("datasets.load", "name"): "digits",
        ("datasets.linear_dynamics", "steps"): 3,
        ("inference.log_joint", "values"): {"z": torch.randn(2, 6, 2)},
        ("inference.decode", "values"): {"z": torch.randn(6, 2)},
        ("inference.compare", "pairs"): {"a": (model, guide)},
        ("inference.pareto_k", "log_w"): torch.randn(30, 3),
        ("inference.gradient_signal", "repeats"): 3,
        ("inference.mcmc_posterior", "data"): world.x[:1],
        ("inference.sandwich", "n"): 3,
        ("inference.calibrate", "n"): 100,
        ("inference.simulate", "n"): 3,
        ("inference.restore", "checkpoint"): _PATH,
        ("inference.float32_products", "route"): "auto",
        ("inference.IWAE", "num_particles"): 2,
        ("inference.Renyi", "num_particles"): 2,
        ("inference.ELBO", "num_particles"): 2,
        ("inference.fit", "epochs"): 1,
        ("inference.learning_rates", "steps"): 10,
        ("inference.gaps", "rounds"): 1,
        ("inference.gaps", "steps"): 2,
        ("inference.gaps", "draws"): 2,
        ("inference.mcmc_posterior", "draws"): 4,
        ("inference.mcmc_posterior", "warmup"): 1,
        ("inference.calibrate", "draws"): 19,
        ("inference.exact_log_evidence", "max_evaluations"): 3000,
        ("inference.ais", "guide"): None,
        ("plots.plot_bounds", "results"): {"a": world.bounds},
        ("plots.plot_ess", "results"): {"a": world.evidence},
        ("plots.plot_pareto_k", "results"): {"a": world.evidence},
        ("plots.plot_gaps", "results"): {"a": world.gaps},
        ("plots.plot_rate_distortion", "results"): {"a": world.rate},
        ("plots.plot_signal", "results"): {"a": {1: world.signal}},
        ("plots.plot_learning_rates", "result"): world.rates,
        ("plots.plot_latent", "z"): torch.randn(6, 2),
        ("plots.plot_latent", "labels"): torch.arange(6) % 2,
        ("plots.plot_imputations", "imputed"): (world.x, world.x, world.x[None]),
        ("plots.plot_imputations", "truth"): world.x,
        ("plots.plot_posterior", "x"): world.x[0],
        ("plots.plot_posterior", "points"): 11,
        ("plots.plot_manifold", "points"): 3,
        ("plots.plot_draws", "posterior"): world.posterior,
        ("plots.save", "picture"): None,
        ("plots.save", "path"): _PATH,
    }
    by_name = {
        "model": model,
        "guide": guide,
        "data": world.x,
        "x": world.x,
        "start": world.x[:1],
        "end": world.x[1:2],
        "images": world.x,
        "history": world.history,
        "evidence": world.evidence,
        "calibration": world.calibration,
        "objective": world.inference.ELBO(2),
        "encoder": world.networks.mlp(4, [5]),
        "decoder": world.networks.mlp(2, [5]),
        "network": world.networks.mlp(7, [5]),
        "likelihood": likelihood,
        "family": family,
        "families": {"z": family},
        "posterior": guide,
        "pseudo_inputs": torch.randn(3, 4),
        "progress": False,
        "particles": 4,
        "chains": 1,
        "temperatures": 2,
        "leapfrog": 1,
        "pilot": 2,
        "shape": (2, 2),
        "features": 4,
        "latent": 2,
        "context": 5,
        "width": 3,
        "widths": [4],
        "hidden": [4],
        "components": 2,
        "covariates": 1,
        "layers": 1,
        "trials": 3,
        "levels": 3,
        "reads": 2,
        "scale": 0.5,
        "share": 0.5,
        "weight": 0.1,
        "steps": 2,
        "period": 4,
        "n": 10,
        "draws": 4,
        "size": 2,
        "h": torch.randn(6, 5),
        "path": _PATH,
        "folder": _PATH,
        "value": 1.0,
    }

    def suit(name, parameter):
        if (key := f"{room}.{owner}", name) in by_owner:
            return by_owner[key, name]
        if name in ("covariates",) and room in ("inference", "plots"):
            return ()
        if parameter.default is not parameter.empty and name not in ("progress", "temperatures", "chains", "particles"):
            if name in ("n", "draws", "leapfrog", "pilot"):
                return by_name[name]
            return parameter.default
        return by_name.get(name, _BY_HINT.get(str(parameter.annotation).strip("'")))

    return suit


_BY_HINT = {"str": "text", "int": 2, "float": 0.5, "Tensor": torch.randn(6), "int | None": None}


@functools.cache
def _flow():
    import zuko

    torch.distributions.Distribution._validate_args = True  # importing zuko turned it off
    return functools.partial(zuko.flows.NSF, transforms=1, hidden_features=(8,))


def _methods(world):
    """Methods of instances: (name, function, valid values of its arguments)."""
    model, guide = world.pair()
    x, z = world.x, torch.randn(6, 2)
    f = world.families
    made = {
        "MeanField(h)": (f.MeanField(2, 5), {"h": torch.randn(6, 5)}),
        "Gaussian(h)": (f.Gaussian(4, 5), {"h": torch.randn(6, 5)}),
        "IAF(h)": (f.IAF(2, 5), {"h": torch.randn(6, 5)}),
        "Mixture(h)": (f.Mixture(2, 5), {"h": torch.randn(6, 5)}),
        "mlp(x)": (world.networks.mlp(4, [5]), {"x": x}),
        "recurrent(x)": (world.networks.recurrent(4, 5), {"x": torch.randn(6, 3, 4)}),
        "PPCA(x)": (model, {"x": x}),
        "PPCA.log_evidence": (model.log_evidence, {"x": x}),
        "PPCA.posterior": (model.posterior, {"x": x}),
        "PPCA.fit": (model.fit, {"x": x}) if hasattr(model, "fit") else None,
        "Amortized(x)": (guide, {"x": x}),
        "IWAE.loss": (world.inference.IWAE(2).loss, {"model": model, "guide": guide, "data": (x,)}),
        "ELBO.differentiable_loss": (
            world.inference.ELBO(2).differentiable_loss,
            {"model": model, "guide": guide, "data": (x,)},
        ),
        "Renyi.loss_and_grads": (
            world.inference.Renyi(0.5, 2).loss_and_grads,
            {"model": model, "guide": guide, "data": (x,)},
        ),
        "Ring.log_evidence": (world.models.Ring().log_evidence, {"x": torch.randn(6, 2)}),
        "FactorAnalysis(x)": (world.models.FactorAnalysis(4, 2), {"x": x}),
        "PosteriorDraws.guide_draws": (world.posterior.guide_draws, {"guide": guide, "draws": 3}),
        "LinearAnnealing(step)": (world.inference.LinearAnnealing(3), {"step": 2}),
        "Dataset": None,
        "Decoder": (world.models.VAE(world.networks.mlp(2, [5]), f.Bernoulli(4, 5), 2), {"x": x.sigmoid().round()}),
        "StandardNormal": (world.models.StandardNormal(2), {}),
        "encoder": (lambda z: model.decode(z), {"z": z}) if hasattr(model, "decode") else None,
    }
    return [(name, *entry) for name, entry in made.items() if entry]


@functools.cache
def targets():
    """All public callables: subpackage, name."""
    found = []
    for room in ROOMS:
        module = importlib.import_module(f"jensen.{room}")
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value) or (inspect.isclass(value) and _can_be_made(value)):
                found.append((room, name))
    return found


def _can_be_made(kind):
    private = any(name.startswith("_") for name in getattr(kind, "__dataclass_fields__", ()))
    return not (
        private or inspect.isabstract(kind) or issubclass(kind, Warning) or getattr(kind, "_is_protocol", False)
    )


class Outcome(typing.NamedTuple):
    """The result of a call that failed the check."""

    call: str
    what: str
    where: str


class Calls:
    """A seeded stream of calls.

    Args:
        seed: of the calls.

    Attributes:
        refused: whether the last call raised a correct error.
    """

    refused = False

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.world = World()
        self.methods = _methods(self.world)

    def one(self):
        """Make a call; return an Outcome if it fails the check, else None."""
        pyro.clear_param_store()
        number = self.random.randrange(len(targets()) + len(self.methods) // 2)
        torch.manual_seed(self.random.randrange(2**31))
        if number < len(targets()):
            room, name = targets()[number]
            function = getattr(importlib.import_module(f"jensen.{room}"), name)
            suit = _suits(self.world, (room, name))  # made for each call, which may change them
            suits = {p: suit(p, q) for p, q in _parameters(function).items()}
            if name == "save":
                suits["picture"] = _axes()
            said = f"{room}.{name}"
        else:
            said, function, suits = self.random.choice(self.methods)
        how_many = self.random.choice([1, 1, 1, 1, 2, 2, 3])
        wrong = self.random.sample(sorted(suits), min(how_many, len(suits)))
        drawn = {p: self.random.choice(sorted(POOL)) for p in wrong}
        given = {**suits, **{p: POOL[key]() for p, key in drawn.items()}}
        text = f"{said}({', '.join(f'{p}={key}' for p, key in drawn.items())})"
        ended = []
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # any text is a valid path to save to
            found = outcome(text, function, given, ended)
        self.refused = found is None and not ended
        return found


def _parameters(function):
    try:
        signature = inspect.signature(function)
    except ValueError:
        return {}
    named = {p: q for p, q in signature.parameters.items() if q.kind not in (q.VAR_KEYWORD,) and p != "self"}
    return {p: q for p, q in named.items() if not p.startswith("_")}


def _call(function, given):
    """Call a function with named values, including those of ``*data``."""
    positional, named = [], dict(given)
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:
        parameters = {}
    spread = [p for p, q in parameters.items() if q.kind is q.VAR_POSITIONAL and p in given]
    if isinstance(function, nn.Module) or spread:
        for p in list(given):
            value = named[p]
            if spread and parameters[p].kind is parameters[p].KEYWORD_ONLY:
                continue
            positional += list(value) if p in spread and isinstance(value, tuple) else [value]
            del named[p]
    return function(*positional, **named)


def outcome(text, function, given, ended=None):
    """The failure of a call; None if there is none. A call that returns is recorded in ``ended``."""

    def late(*_):
        raise _Slow

    failed = None
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            _call(function, given)
            (ended if ended is not None else []).append(text)
    except _Slow:
        return Outcome(text, "hangs", "")
    except BaseException as error:
        failed = error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return None if failed is None else _judged(text, failed, given)  # which is slow the first time


def _short(file: str) -> str:
    """A file's path inside its library."""
    return file.rpartition("/jensen/")[2].rpartition("/site-packages/")[2].rpartition("/lib/")[2]


def _judged(text, error, given):
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    where = f"{_short(last.filename)}:{last.lineno}"
    inner = next((f for f in reversed(frames) if _LIBRARY in f.filename), last)
    where = f"{where} < {_short(inner.filename)}:{inner.lineno} {inner.name}"
    what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
    if isinstance(error, KeyError) and "of the user's own" in str(error):
        return None
    if ("Expected parameter" in what or "must have the same dtype" in what) and text.partition(".")[0] not in ROOMS:
        return None  # a program or layer called alone: the errors of torch's own distributions and layers
    if isinstance(error, OSError) and error.filename is not None:  # which is no file
        return None
    if not (last.filename.startswith(_LIBRARY) and isinstance(error, OWN) and _raised(last)):
        return Outcome(text, what, where)
    if "\n" in str(error).strip() or len(str(error)) > 1500 or not _names(str(error), given):
        return Outcome(text, f"no sentence that names an argument: {what}", where)
    return None


def _names(message, given):
    """Whether a message names an argument, a site, or the callable."""
    words = set(re.findall(r"\w+", message))
    return not words.isdisjoint({*given, *_ROLES})


@functools.cache
def _raises_of(filename):
    tree = ast.parse("".join(linecache.getlines(filename)))
    return [(node.lineno, node.end_lineno) for node in ast.walk(tree) if isinstance(node, ast.Raise)]


def _raised(frame):
    return any(first <= frame.lineno <= last for first, last in _raises_of(frame.filename))
