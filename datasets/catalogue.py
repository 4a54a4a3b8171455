"""The catalogue of data set cards. A result is listed only if its publication reports it on exactly these data."""

from __future__ import annotations

__all__ = ["CARDS"]

from .cards import Card, Result

_BURDA = "Burda et al. 2016, https://arxiv.org/abs/1509.00519"
_MADE = "Germain et al. 2015, https://arxiv.org/abs/1502.03509"
_PIXEL = "van den Oord et al. 2016, https://arxiv.org/abs/1601.06759"
_PUT = "put in place"
_MADE_HERE = "synthetic"
_UNIT = (0.0, 1.0)

_DIGITS = Card(
    name="digits",
    summary="handwritten digits at low resolution, small enough to be embedded",
    splits={"train": 1197, "validation": 200, "test": 400},
    shape=(8, 8),
    value_range=_UNIT,
    levels=17,
    classes=10,
    licence="CC BY 4.0 (UCI); shipped with scikit-learn (BSD 3-Clause)",
    citation="Alpaydin and Kaynak (1998), Optical Recognition of Handwritten Digits, UCI ML Repository",
    address="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
    access="embedded",
    note="Dequantized by default; the split is random, fixed by seed.",
)
_MNIST = Card(
    name="mnist",
    summary="handwritten digits",
    splits={"train": 50_000, "validation": 10_000, "test": 10_000},
    shape=(28, 28),
    value_range=_UNIT,
    levels=256,
    classes=10,
    licence="none stated",
    citation="LeCun, Bottou, Bengio and Haffner (1998), Gradient-Based Learning Applied to Document Recognition",
    address="https://yann.lecun.com/exdb/mnist/",
    access="downloaded",
    note="The published results use pixels binarized anew in each epoch (batch_transform=torch.bernoulli), with 400 "
    "training points held out.",
    results=(
        Result("VAE, 1 stochastic layer", 86.76, "nats", _BURDA),
        Result("VAE, 2 stochastic layers", 85.33, "nats", _BURDA),
        Result("IWAE, 1 stochastic layer, k = 50", 84.78, "nats", _BURDA),
        Result("IWAE, 2 stochastic layers, k = 50", 82.90, "nats", _BURDA),
    ),
)
_BINARIZED_MNIST = Card(
    name="binarized_mnist",
    summary="handwritten digits, binarized at random once",
    splits={"train": 50_000, "validation": 10_000, "test": 10_000},
    shape=(28, 28),
    value_range=_UNIT,
    levels=2,
    classes=0,
    licence="none stated",
    citation="Salakhutdinov and Murray (2008), On the Quantitative Analysis of Deep Belief Networks; "
    "Larochelle and Murray (2011), The Neural Autoregressive Distribution Estimator",
    address="https://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/",
    access="downloaded",
    note="The test data are sorted by class. Results on MNIST binarized anew in each epoch are not comparable.",
    results=(
        Result("NADE", 88.33, "nats", _MADE),
        Result("MADE, 2 hidden layers, 32 masks", 86.64, "nats", _MADE),
        Result("IWAE, 2 stochastic layers, k = 50", 85.32, "nats", _BURDA),
        Result("DRAW, at most", 80.97, "nats", "Gregor et al. 2015, https://arxiv.org/abs/1502.04623"),
        Result("PixelRNN, diagonal BiLSTM, 7 layers", 79.20, "nats", _PIXEL),
    ),
)
_FASHION_MNIST = Card(
    name="fashion_mnist",
    summary="articles of clothing, in the format of MNIST",
    splits={"train": 50_000, "validation": 10_000, "test": 10_000},
    shape=(28, 28),
    value_range=_UNIT,
    levels=256,
    classes=10,
    licence="MIT (Zalando SE)",
    citation="Xiao, Rasul and Vollgraf (2017), Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning "
    "Algorithms",
    address="https://github.com/zalandoresearch/fashion-mnist",
    access="downloaded",
)
_OMNIGLOT = Card(
    name="omniglot",
    summary="characters of 50 alphabets, at 28 x 28 as Burda et al. distribute them",
    splits={"train": 23_000, "validation": 1_345, "test": 8_070},
    shape=(28, 28),
    value_range=_UNIT,
    levels=None,
    classes=50,
    licence="MIT (Omniglot); none stated for the 28 x 28 version",
    citation="Lake, Salakhutdinov and Tenenbaum (2015), Human-Level Concept Learning through Probabilistic Program "
    "Induction; Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders",
    address="https://github.com/yburda/iwae/tree/master/datasets/OMNIGLOT",
    access=_PUT,
    note="Grey values are averages, usually binarized anew in each epoch, as for the published results. Labels are "
    "alphabets. No SHA-256 of the file is known: its arrays are checked for shape and range instead.",
    results=(
        Result("VAE, 1 stochastic layer", 108.11, "nats", _BURDA),
        Result("VAE, 2 stochastic layers", 107.58, "nats", _BURDA),
        Result("IWAE, 1 stochastic layer, k = 50", 104.67, "nats", _BURDA),
        Result("IWAE, 2 stochastic layers, k = 50", 103.38, "nats", _BURDA),
    ),
)
_CALTECH = Card(
    name="caltech101_silhouettes",
    summary="filled outlines of objects, binary",
    splits={"train": 4_100, "validation": 2_264, "test": 2_307},
    shape=(28, 28),
    value_range=_UNIT,
    levels=2,
    classes=101,
    licence="none stated",
    citation="Marlin, Swersky, Chen and de Freitas (2010), Inductive Principles for Restricted Boltzmann Machine "
    "Learning",
    address="https://people.cs.umass.edu/~marlin/data.shtml",
    access=_PUT,
    note="Zeros and ones as published; some authors swap them. No SHA-256 of the file is known: its arrays are "
    "checked for shape and range instead.",
)
_FREY_FACES = Card(
    name="frey_faces",
    summary="one man's face in successive frames of a video",
    splits={"train": 1_565, "validation": 200, "test": 200},
    shape=(28, 20),
    value_range=_UNIT,
    levels=256,
    classes=0,
    licence="none stated",
    citation="Roweis, Saul and Hinton (2002), Global Coordination of Local Linear Models",
    address="https://cs.nyu.edu/~roweis/data.html",
    access="downloaded",
    note="The split is random, fixed by seed, and successive frames are similar: a test image has near copies among "
    "the training images.",
)
_CIFAR10 = Card(
    name="cifar10",
    summary="colour photographs of ten kinds of things",
    splits={"train": 45_000, "validation": 5_000, "test": 10_000},
    shape=(3, 32, 32),
    value_range=_UNIT,
    levels=256,
    classes=10,
    licence="none stated",
    citation="Krizhevsky (2009), Learning Multiple Layers of Features from Tiny Images",
    address="https://www.cs.toronto.edu/~kriz/cifar.html",
    access="downloaded",
    note="Each row has the red, green and blue planes one after the other. The last 5,000 training images are held "
    "out. 740 MB in float32.",
    results=(
        Result("Real NVP", 3.49, "bits/dim", "Dinh et al. 2017, https://arxiv.org/abs/1605.08803"),
        Result("Glow", 3.35, "bits/dim", "Kingma & Dhariwal 2018, https://arxiv.org/abs/1807.03039"),
        Result(
            "ResNet VAE with IAF, at most", 3.11, "bits/dim", "Kingma et al. 2016, https://arxiv.org/abs/1606.04934"
        ),
        Result("PixelRNN", 3.00, "bits/dim", _PIXEL),
        Result("PixelCNN++", 2.92, "bits/dim", "Salimans et al. 2017, https://arxiv.org/abs/1701.05517"),
        Result("NVAE, at most", 2.91, "bits/dim", "Vahdat & Kautz 2020, https://arxiv.org/abs/2007.03898"),
        Result("Very deep VAE, at most", 2.87, "bits/dim", "Child 2021, https://arxiv.org/abs/2011.10650"),
    ),
)
_OIL_FLOW = Card(
    name="oil_flow",
    summary="three-phase oil flow in a pipe, measured by twelve gamma-ray densitometers",
    splits={"train": 1_000, "validation": 1_000, "test": 1_000},
    shape=(12,),
    value_range=None,
    levels=None,
    classes=3,
    licence="none stated",
    citation="Bishop and James (1993), Analysis of Multiphase Flows Using Dual-Energy Gamma Densitometry and "
    "Neural Networks",
    address="https://inverseprobability.com/3PhaseData",
    access=_PUT,
    note="There is no download with a known checksum: put the file in place; the error of load names the folder.",
)
_SPLITS = {"train": 4_000, "validation": 500, "test": 500}
_NOTE = "Made when asked for, by seed; its log_density is exact. The sizes are those of load, and arguments of "
_OURS = "Apache-2.0 (jensen)"
_LINEAR_GAUSSIAN = Card(
    name="linear_gaussian",
    summary="a noisy linear subspace of eight dimensions: probabilistic PCA is the true model",
    splits=_SPLITS,
    shape=(8,),
    value_range=None,
    levels=None,
    classes=0,
    licence=_OURS,
    citation="Tipping and Bishop (1999), Probabilistic Principal Component Analysis",
    address="",
    access=_MADE_HERE,
    note=_NOTE + "jensen.datasets.linear_gaussian.",
)
_PINWHEEL = Card(
    name="pinwheel",
    summary="five curved clusters in the plane",
    splits=_SPLITS,
    shape=(2,),
    value_range=None,
    levels=None,
    classes=5,
    licence=_OURS,
    citation="Johnson, Duvenaud, Wiltschko, Adams and Datta (2016), Composing Graphical Models with Neural Networks "
    "for Structured Representations and Fast Inference",
    address="",
    access=_MADE_HERE,
    note=_NOTE + "jensen.datasets.pinwheel.",
)
_BARS = Card(
    name="bars",
    summary="binary images of horizontal and vertical bars with flipped pixels",
    splits=_SPLITS,
    shape=(4, 4),
    value_range=_UNIT,
    levels=2,
    classes=0,
    licence=_OURS,
    citation="Földiák (1990), Forming Sparse Representations by Local Anti-Hebbian Learning",
    address="",
    access=_MADE_HERE,
    note=_NOTE + "jensen.datasets.bars.",
)
_LINEAR_DYNAMICS = Card(
    name="linear_dynamics",
    summary="sequences of 20 steps of a linear-Gaussian state space model",
    splits={"train": 800, "validation": 100, "test": 100},
    shape=(20, 3),
    value_range=None,
    levels=None,
    classes=0,
    licence=_OURS,
    citation="Kalman (1960), A New Approach to Linear Filtering and Prediction Problems; Roweis and Ghahramani (1999), "
    "A Unifying Review of Linear Gaussian Models",
    address="",
    access=_MADE_HERE,
    note=_NOTE + "jensen.datasets.linear_dynamics.",
)

CARDS = (
    _DIGITS,
    _MNIST,
    _BINARIZED_MNIST,
    _FASHION_MNIST,
    _OMNIGLOT,
    _CALTECH,
    _FREY_FACES,
    _CIFAR10,
    _OIL_FLOW,
    _LINEAR_GAUSSIAN,
    _PINWHEEL,
    _BARS,
    _LINEAR_DYNAMICS,
)
