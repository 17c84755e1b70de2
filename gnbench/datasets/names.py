"""The names of the classes of the official datasets, in the order of their labels."""

from __future__ import annotations

from gnbench.config import DatasetConfig
from gnbench.datasets import Dataset

# cs.toronto.edu/~kriz/cifar.html; batches.meta of cifar-10-python.tar.gz.
CIFAR10 = [
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
]  # fmt: skip
# Likewise; fine_label_names in meta of cifar-100-python.tar.gz.
CIFAR100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle
    bowl boy bridge bus butterfly camel can castle caterpillar cattle
    chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur
    dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard
    lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain
    mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree
    plain plate poppy porcupine possum rabbit raccoon ray road rocket
    rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
    train trout tulip turtle wardrobe whale willow_tree wolf woman worm
""".split()  # noqa: SIM905  (a hundred pairs of quotes are not easier to read)
# github.com/zalandoresearch/fashion-mnist, "Labels".
FASHION_MNIST = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip
SVHN = [str(digit) for digit in range(10)]  # ufldl.stanford.edu/housenumbers: 10 is the digit 0

OFFICIAL = {
    "gnbench.datasets.cifar10": CIFAR10,
    "gnbench.datasets.cifar100": CIFAR100,
    "gnbench.datasets.svhn": SVHN,
    "gnbench.datasets.fashion_mnist": FASHION_MNIST,
    "gnbench.datasets.fashion_mini": FASHION_MNIST,
}


def class_names(settings: DatasetConfig, dataset: Dataset) -> list[str]:
    """Name the classes of a dataset: by its folders, else officially, else by their numbers."""
    found = dataset.facts.get("class_names") or OFFICIAL.get(settings.target) or []
    if len(found) == settings.classes:
        return [str(name) for name in found]
    return [f"class {label}" for label in range(settings.classes)]
