"""Typical mistakes of users: one exception each, checked by its message."""

import math
import warnings
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from members import pair
from pyro.infer import (
    EnergyDistance,
    JitTrace_ELBO,
    JitTraceMeanField_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceGraph_ELBO,
)
from torch import nn

from jensen.datasets import from_array
from jensen.families import Gaussian, MeanField, Sylvester
from jensen.guides import Amortized, ExactPosterior, amortize
from jensen.inference import (
    ELBO,
    IWAE,
    Renyi,
    bounds,
    calibrate,
    compare,
    decode,
    evaluate,
    exact_log_evidence,
    fit,
    log_joint,
    log_weights,
    mcmc_posterior,
    simulate,
    terms,
)
from jensen.models import PPCA, VAE, FactorAnalysis, LearnedPrior, LinearGaussianSSM, MixtureOfPPCA, VampPrior
from jensen.networks import conv_decoder, conv_encoder, mlp, recurrent, residual_mlp
from jensen.plots import plot_images, plot_latent, plot_manifold


def _fit(model, guide, x, **options):
    return fit(model, guide, x, epochs=1, progress=False, **options)


def _evaluate(model, guide, x, **options):
    return evaluate(model, guide, x, 10, progress=False, **options)


each_use = pytest.mark.parametrize("use", [log_weights, _fit, _evaluate], ids=["log_weights", "fit", "evaluate"])


@each_use
@pytest.mark.parametrize(("bad", "what"), [(math.nan, "1 NaN"), (math.inf, "1 values that are NaN or infinite")])
def test_values_that_are_not_finite(use, bad, what):
    model, guide, x = pair("PPCA", "MeanField")
    x[4, 2] = bad
    with pytest.raises(ValueError, match=rf"data\[0\] holds {what}, the first at index \[4, 2\]"):
        use(model, guide, x)


@each_use
@pytest.mark.parametrize("guide_name", ["MeanField", "ExactPosterior", "PriorGuide"])
def test_a_wrong_width(use, guide_name):
    model, guide, x = pair("PPCA", guide_name)
    expected = (
        r"this network expects 5 features" if guide_name == "MeanField" else r"PPCA expects data x of shape \[N, 5\]"
    )
    with pytest.raises(ValueError, match=rf"{expected}.*got"):
        use(model, guide, x[:, :4])


@each_use
def test_data_outside_the_support(use):
    model, guide, x = pair("VAE, Bernoulli", "MeanField")
    with pytest.raises(
        ValueError,
        match=r"site 'x' lie outside the support of Bernoulli in \d places \(values from 0.5 to 0.5 there\); binarize",
    ):
        use(model, guide, torch.full_like(x, 0.5))


@each_use
def test_an_empty_set(use):
    model, guide, x = pair("PPCA", "MeanField")
    with pytest.raises(ValueError, match=r"data\[0\] is empty|N of at least 1, but got tensors of shape \[\[0, 5\]\]"):
        use(model, guide, x[:0])


@pytest.mark.parametrize("particles", [0, -3])
def test_too_few_particles(particles):
    model, guide, x = pair("PPCA", "MeanField")
    message = f"particles is the number of samples from the guide, at least 1, but got {particles}"
    with pytest.raises(ValueError, match=message):
        log_weights(model, guide, x, particles=particles)
    with pytest.raises(ValueError, match=message):
        evaluate(model, guide, x, particles)


def _two_sites(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True) + u.unsqueeze(-1), 1.0).expand_by([1]).to_event(1), obs=x)


@each_use
def test_a_guide_that_misses_a_site(use):
    guide = Amortized(nn.Identity(), {"z": MeanField(2, 5)})
    with pytest.raises(ValueError, match=r"the guide misses \['u'\] of the model's latent sites \['u', 'z'\]"):
        use(_two_sites, guide, torch.randn(7, 5))


@each_use
def test_a_guide_with_a_site_too_many(use):
    model, _, x = pair("PPCA", "MeanField")
    guide = Amortized(nn.Identity(), {"z": MeanField(2, 5), "w": MeanField(1, 7)})
    with pytest.raises(ValueError, match=r"the guide samples \['w'\], but the model's latent sites are \['z'\]"):
        use(model, guide, x)


@each_use
def test_a_plate_that_only_the_guide_has(use):
    model, _, x = pair("PPCA", "MeanField")

    def guide(x):
        with pyro.plate("rows", len(x), dim=-1):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(2)), 1.0).to_event(1))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        use(model, guide, x)
    assert any("the guide's plates ['rows'] are not in the model" in str(w.message) for w in caught)


def test_a_checkpoint_of_another_pair(tmp_path):
    model, guide, x = pair("PPCA", "MeanField")
    _fit(model, guide, x, checkpoint=tmp_path / "c.pt")
    other, other_guide, _ = pair("PPCA", "FullCovariance")
    with pytest.raises(
        ValueError, match=r"c.pt is a checkpoint of another model or guide: only it has \['guide.families.z.affine"
    ):
        _fit(other, other_guide, x, checkpoint=tmp_path / "c.pt", resume=True)


@pytest.mark.parametrize("kept", [0, 10, 1000])
def test_a_torn_checkpoint(tmp_path, kept):
    model, guide, x = pair("PPCA", "MeanField")
    file = tmp_path / "c.pt"
    _fit(model, guide, x, checkpoint=file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"c.pt cannot be read as a checkpoint, because it is damaged or another"):
        _fit(model, guide, x, checkpoint=file, resume=True)


def test_a_file_that_is_no_checkpoint(tmp_path):
    model, guide, x = pair("PPCA", "MeanField")
    torch.save({"weights": x}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c.pt is not a checkpoint written by fit"):
        _fit(model, guide, x, checkpoint=tmp_path / "c.pt", resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs and batch_size are at least 1, but got 0 and 128"),
        ({"batch_size": 0}, "epochs and batch_size are at least 1, but got 100 and 0"),
        ({"patience": 3}, "patience counts epochs without a better validation bound: give validation data"),
        ({"resume": True}, "resume needs a checkpoint: give its file"),
    ],
)
def test_settings_of_fit_that_make_no_sense(options, message):
    model, guide, x = pair("PPCA", "MeanField")
    with pytest.raises(ValueError, match=message):
        fit(model, guide, x, progress=False, **options)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (RenyiELBO(alpha=0.0, num_particles=5), r"no differentiable_loss.*use jensen.inference.IWAE\(5\)"),
        (RenyiELBO(alpha=0.5, num_particles=7), r"no differentiable_loss.*use jensen.inference.Renyi\(0.5, 7\)"),
        (TraceGraph_ELBO(), r"no differentiable_loss.*jensen.inference.ELBO\(10\).*baseline"),
        (ReweightedWakeSleep(), r"no differentiable_loss.*SVI\(model, guide, optim, ReweightedWakeSleep\(...\)\)"),
        (EnergyDistance(), r"EnergyDistance has no differentiable_loss.*SVI"),
        (JitTrace_ELBO(), r"JitTrace_ELBO uses torch.jit.trace.* use Trace_ELBO\(\)"),
        (JitTraceMeanField_ELBO(), r"JitTraceMeanField_ELBO uses .* use TraceMeanField_ELBO\(\)"),
        (Trace_ELBO, r"is the class Trace_ELBO: give an instance, Trace_ELBO\(\)"),
    ],
)
def test_objectives_that_fit_does_not_take_have_one_that_it_does(objective, message):
    model, guide, x = pair("PPCA", "MeanField")
    with pytest.raises(TypeError, match=message):
        fit(model, guide, x, objective, progress=False)


def test_pyros_optimizers_serve_svi_not_fit():
    model, guide, x = pair("PPCA", "MeanField")
    with pytest.raises(TypeError, match=r"optimizer must make a torch.optim.Optimizer, but it made a PyroOptim"):
        _fit(model, guide, x, optimizer=lambda parameters, lr: pyro.optim.Adam({"lr": lr}))


def test_nothing_to_train():
    model, guide, x = pair("PPCA", "MeanField")
    with pytest.raises(ValueError, match="there is nothing to train"):
        _fit(model, guide, x, freeze=[model, guide])


def test_data_that_are_no_tensors():
    model, guide, x = pair("PPCA", "MeanField")
    with pytest.raises(
        TypeError, match=r"data is a tensor or a tuple of tensors, but got ndarray; use torch.as_tensor"
    ):
        _evaluate(model, guide, x.numpy())


def _loss(model, guide, *data):
    return IWAE(2).loss(model, guide, *data)


@pytest.mark.parametrize("use", [log_weights, terms, _loss], ids=["log_weights", "terms", "IWAE.loss"])
def test_a_number_among_the_data(use):
    model, guide, x = pair("PPCA", "MeanField")
    with pytest.raises(TypeError, match=r"data\[1\] is a float; .*give `lambda x: model\(x, 0.5"):
        use(model, guide, x, 0.5)


def test_an_option_that_is_a_tensor_without_dimensions():
    model, guide, x = pair("PPCA", "MeanField")
    with pytest.raises(ValueError, match=r"of shape \[\[\]\]; if it is an option .*partial\(model, data"):
        _evaluate(model, guide, torch.tensor(0.5))
    with pytest.raises(
        TypeError, match=r"the model takes .*argument that is not data: give `lambda x: model\(x, other"
    ):
        log_weights(model, guide, x, torch.tensor(0.5))


@each_use
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_whole_numbers_for_layers_that_read_others(use, dtype):
    model, guide, x = pair("PPCA", "MeanField")
    with pytest.raises(ValueError, match=rf"must be torch.float32 for the layers, but got {dtype}: convert it"):
        use(model, guide, torch.ones_like(x).to(dtype))


@each_use
def test_tensors_without_values(use):
    model, guide, x = pair("PPCA", "MeanField")
    with pytest.raises(ValueError, match="must hold values, but got a tensor on the device 'meta'"):
        use(model, guide, x.to("meta"))
    with pytest.raises(ValueError, match=r"must be real, but got torch.complex64"):
        use(model, guide, x.to(torch.complex64))


def test_a_discrete_site_that_nobody_enumerates_is_told_how():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.ones(2)))
            pyro.sample("x", dist.Normal(c.to(x.dtype), 1.0), obs=x)

    with pytest.raises(ValueError, match=r"misses \['c'\].*sum over its states: give pyro.infer.config_enumerate"):
        evaluate(model, lambda x: None, torch.randn(5), 3, progress=False)


@pytest.mark.parametrize(
    ("transform", "kind", "message"),
    [
        (lambda x: x[:2], TypeError, r"batch_transform must return .*but it returned a tensor"),
        (lambda: None, ValueError, r"batch_transform fails on a tensor of shape \[7, 5\] \(TypeError"),
        (lambda x: "a", TypeError, r"it returned 'a' \(a str\)"),
    ],
)
def test_transforms_that_make_no_batch(transform, kind, message):
    model, guide, x = pair("PPCA", "MeanField")
    with pytest.raises(kind, match=message):
        _evaluate(model, guide, x, batch_transform=transform)


def test_what_users_raise_stays_what_it_is():
    class Mine(ValueError):
        pass

    def model(x):
        raise Mine("first\nsecond")

    with pytest.raises(Mine, match="first\nsecond"):
        _evaluate(model, lambda x: None, torch.randn(5))


def test_tensors_of_different_lengths():
    model, guide, x = pair("PPCA", "MeanField")
    with pytest.raises(
        ValueError,
        match=r"share a first dimension N of at least 1, but got tensors of shape \[\[7, 5\], \[6, 5\]\]",
    ):
        _evaluate(model, guide, (x, x[1:]))


def test_a_model_that_subsamples_cannot_be_evaluated():
    x = torch.randn(100)

    def model(batch):
        with pyro.plate("data", 100, subsample_size=10) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    with pytest.raises(
        ValueError, match=r"have sizes \(10,\), but the model was given 64 data points: use a model that"
    ):
        _evaluate(model, lambda x: pyro.poutine.block(model, hide=["x"])(x), x)


def test_weights_that_are_nan_are_not_averaged_away():
    """A log-density that is broken for positive values."""

    class Broken(dist.Normal):
        def log_prob(self, value):
            return torch.where(value > 0, math.nan, super().log_prob(value))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", Broken(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    with pytest.raises(FloatingPointError, match=r"of 1 data points of this batch are NaN or .*, the first at row 2"):
        _evaluate(model, guide, torch.tensor([-1.0, -1.0, 1.0]))


def test_log_joint_says_which_values_it_lacks():
    model, _, x = pair("PPCA", "MeanField")
    with pytest.raises(ValueError, match=r"missing \['z'\], not in the model \['w'\]"):
        log_joint(model, {"w": torch.zeros(1, 7, 2)}, x)


def test_comparisons_need_pairs_and_their_own_histories():
    model, guide, x = pair("PPCA", "MeanField")
    with pytest.raises(ValueError, match="compare needs at least one pair"):
        compare({}, x)
    history = _fit(model, guide, x)
    with pytest.raises(ValueError, match=r"histories \['b'\]"):
        compare({"a": (model, guide)}, x, histories={"b": history})


def test_bounds_need_a_power_of_two_and_data():
    model, guide, x = pair("PPCA", "MeanField")
    with pytest.raises(ValueError, match="a power of two as its largest number of particles, but got 100"):
        bounds(model, guide, x, particles=100)
    joint = pyro.infer.autoguide.AutoMultivariateNormal(model)
    with pytest.raises(ValueError, match=r"weights of this model and guide are joint"):
        bounds(model, joint, x, particles=4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gaussian(3, 4, scale="full"), r"'shared', 'diagonal' or 'context', but got 'full'"),
        (lambda: Gaussian(3, 4, scale=-1.0), "but got -1.0"),
        (lambda: MeanField(0, 4), "features and context of at least 1, but got features=0, context=4"),
        (
            lambda: MeanField(2, 4)(torch.zeros(5, 3)),
            r"MeanField expects a context of width 4, but got shape \(5, 3\)",
        ),
        (lambda: mlp(4, []), "mlp needs at least one layer"),
        (
            lambda: mlp(4, [3])(torch.zeros(5, 6)),
            r"expects 4 features in the last dimension of its input, but got shape \(5, 6\)",
        ),
        (lambda: Amortized(nn.Identity(), {}), "at least one latent site"),
        (lambda: PPCA(5, 2)(n=0), "PPCA needs at least one data point, but got 0"),
        (
            lambda: VAE(mlp(2, [4]), Gaussian(5, 4), 2)(torch.zeros(3, 6)),
            r"VAE expects data x of shape \[N, 5\], but got \[3, 6\]",
        ),
        (
            lambda: PPCA(5, 2).log_evidence(torch.zeros(5)),
            r"PPCA expects data x of shape \[N, 5\], but got \[5\]",
        ),
        (
            lambda: Amortized(mlp(5, [3]), {"z": MeanField(2, 3)})(torch.zeros(0, 5)),
            "at least 1, but have no rows",
        ),
        (lambda: residual_mlp(4, -1), r"widths of layers must be at least 1, but got 4 and \[-1\]"),
        (lambda: conv_encoder((1, 4, 4), [2, -1], 8), r"channels of at least 1, but got \[2, -1\]"),
        (lambda: conv_decoder(3, (1, 4, 4), [2]), r"at least one layer, and channels of at least 1, but got \[2\]"),
        (
            lambda: from_array((torch.zeros(6, 4), torch.zeros(5))),
            "x is a tuple of 2, which NumPy does not read as a numeric array",
        ),
        (
            lambda: mcmc_posterior(PPCA(4, 2), torch.ones(1, 4).bool(), progress=False),
            r"observed at site 'x' of Normal are torch.bool, which its density does not accept: convert them",
        ),
        (
            lambda: PPCA(4, 2).posterior(torch.zeros(0, 4)),
            r"PPCA needs at least one data point in x, but got shape \[0, 4\]",
        ),
        (
            lambda: exact_log_evidence(PPCA(4, 2), (torch.zeros(6, 4), torch.zeros(6)), method="closed form"),
            r"do not run on data\[0\] of shape \[6, 4\].*TypeError: .*takes 2 positional arguments",
        ),
        (
            lambda: calibrate(PPCA(4, 2), ExactPosterior(PPCA(4, 2)), 100, 19, covariates=torch.tensor(3)),
            r"covariates need one row for each of the n=100 data points, but one has shape \[\]",
        ),
        (
            lambda: decode(PPCA(4, 2), {"z": torch.zeros(6, 2)}, data=(torch.zeros(6, 4), torch.zeros(6, 4))),
            r"do not run on data\[0\] of shape \[6, 4\].*TypeError: .*takes from 1 to 2 positional arguments",
        ),
        (
            lambda: decode(PPCA(4, 2), {"z": torch.zeros(6, 2)}, data=torch.zeros(6, 3)),
            r"^PPCA expects data x of shape \[N, 4\], but got \[6, 3\]$",
        ),
        (lambda: plot_latent(torch.full((6, 4), math.nan)), "z or prior holds NaN or infinity"),
        (
            lambda: LearnedPrior(MeanField(2, None), spread=math.inf),
            "spread must be a positive standard deviation, but got inf",
        ),
        (lambda: PPCA(4, 2, prior_scale=math.inf), "prior_scale is a positive standard deviation, but got inf"),
        (
            lambda: Sylvester(3, 4, layers=-1),
            r"Sylvester has no parameters with these settings \(features=3",
        ),
        (
            lambda: from_array(torch.eye(6, 4).to_sparse()),
            "x must be a dense tensor, but got one of layout torch.sparse_coo",
        ),
        (lambda: from_array(torch.zeros(6, 4), torch.zeros(6).to_sparse()), "labels must be a dense tensor"),
        (
            lambda: amortize(lambda x: PPCA(4, 2)(x), nn.Linear(3, 3), data=torch.zeros(6, 4)),
            r"encoder cannot be called on data of shape \[6, 4\]: RuntimeError: mat1 and mat2",
        ),
        (
            lambda: exact_log_evidence(nn.Linear(4, 3), torch.zeros(6, 4, dtype=torch.uint8), progress=False),
            r"do not run on data\[0\] of shape \[6, 4\] \(torch.uint8\)",
        ),
        (lambda: recurrent(5, 3)(torch.zeros(2, 0, 5)), r"sequences x of shape \[..., T, 5\], T at least 1, but got"),
        (
            lambda: plot_manifold(PPCA(4, 2), (2, 2), covariates=(torch.zeros(6, 4), torch.zeros(5))),
            r"covariates must have one row here, \[1, ...\], but got a tensor of shape \[6, 4\]",
        ),
        (
            lambda: plot_images(torch.zeros(6, 4), (2, 2), columns=0),
            "columns is the number of images or panels per row",
        ),
        (
            lambda: amortize(lambda x: PPCA(4, 2)(x), data=(torch.zeros(6, 4), torch.zeros(6, 4))),
            r"do not run on data\[0\] of shape \[6, 4\].*: TypeError: .*takes 1 positional argument",
        ),
    ],
)
def test_wrong_sizes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("call", ["log_evidence", "posterior"])
@pytest.mark.parametrize(
    "model",
    [PPCA(4, 2), FactorAnalysis(4, 2), MixtureOfPPCA(4, 2, components=2), LinearGaussianSSM(4, 2, steps=3)],
    ids=lambda model: type(model).__name__,
)
def test_exact_densities_name_numbers_of_another_kind(model, call):
    x = torch.zeros(6, *model.event_shape)
    for other, message in (
        (x.bool(), "is a density of real numbers, but x is torch.bool: use x.float()"),
        (x.double(), "x is torch.float64, but the parameters of .* are torch.float32: use x.to"),
    ):
        with pytest.raises(ValueError, match=message):
            getattr(model, call)(other)
    getattr(model.double(), call)(x)
    model.float()


def test_only_guides_take_objects_that_say_their_latents():
    said = SimpleNamespace(latents={"z": (2,)})
    assert amortize(said, mlp(4, [5]), context=5)(torch.zeros(3, 4))["z"].shape == (3, 2)
    with pytest.raises(TypeError, match="model must be a function, but got a SimpleNamespace"):
        simulate(said, 3)


def test_a_prior_names_pseudo_inputs_that_its_posterior_does_not_read():
    posterior = nn.Sequential(mlp(4, [5]), MeanField(2, 5))
    for other in (torch.randn(3, 4).double(), torch.randn(3, 4).half()):
        with pytest.raises(
            ValueError, match=r"posterior cannot be called with the pseudo_inputs, a tensor of shape \[3, 4\]"
        ):
            VampPrior(posterior, other)


def test_the_exact_posterior_draws_one_site():
    model = PPCA(5, 2)
    model.latents = {"z": torch.Size([1]), "u": torch.Size([1])}
    with pytest.raises(ValueError, match=r"one latent site, but this model has \['z', 'u'\]"):
        ExactPosterior(model)


def test_the_exact_posterior_must_be_known():
    model, _, _ = pair("VAE, shared scale", "MeanField")
    with pytest.raises(TypeError, match=r"VAE has no posterior\(x\): use a model with a known posterior"):
        ExactPosterior(model)


def test_optimizers_of_pyro_by_name():
    model, guide, x = pair("PPCA", "MeanField")
    with pytest.raises(TypeError, match=r"optimizer\(parameters, lr=lr\) fails: .*; give a class such as"):
        _fit(model, guide, x, optimizer=pyro.optim.Adam)


def test_schedulers_are_looked_at_before_the_first_epoch():
    model, guide, x = pair("PPCA", "MeanField")
    with pytest.raises(TypeError, match="makes an object with step, state_dict, load_state_dict, but it made"):
        _fit(model, guide, x, scheduler=lambda optimizer: "text")
    with pytest.raises(TypeError, match=r"scheduler\(optimizer\) fails: .* takes 0 positional arguments"):
        _fit(model, guide, x, scheduler=lambda: None)


@pytest.mark.parametrize("family", [nn.Linear(3, 3), lambda: None])
@pytest.mark.parametrize("model", [PPCA(4, 2), lambda x: PPCA(4, 2)(x)], ids=["latents", "program"])
def test_families_are_called_with_features_and_context(model, family):
    with pytest.raises(TypeError, match=r"family must be callable as family\(features, .* failed: .*positional"):
        amortize(model, mlp(4, [5]), family, context=5, data=torch.zeros(6, 4))


@pytest.mark.parametrize("objective", [ELBO(2), IWAE(2), Renyi(0.5, 2)], ids=lambda o: type(o).__name__)
def test_objectives_name_a_pair_without_sites(objective):
    with pytest.raises(ValueError, match="there are no sites: neither model nor guide"):
        objective.loss(nn.Linear(4, 3), lambda x: "text", torch.zeros(6, 4))


def test_rates_that_an_optimizer_refuses_are_named():
    model, guide, x = pair("PPCA", "MeanField")
    with pytest.raises(ValueError, match=r"optimizer\(parameters, lr=-1\) fails: Invalid learning rate"):
        _fit(model, guide, x, lr=-1)
