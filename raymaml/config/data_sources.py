"""The data sets: one model each, chosen by ``kind``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raymaml.config.base import Count, PathField, PositiveInt, PositiveRate, Section


class _DataSource(Section):
    duplicates: Literal["keep", "drop", "refuse"] = "keep"
    """Pictures that are in two splits, equal or nearly so: keep warns of them; drop takes those of
    train that are in val or test, and those of val that are in test, out, so that test stays whole;
    refuse imports nothing then. Of equal pictures of one class an image-folder keeps one, and a
    published data set all, or one with drop."""


class GlyphsSource(_DataSource):
    """Characters drawn with the fonts that matplotlib ships; no download."""

    kind: Literal["glyphs"]
    min_fonts: PositiveInt = 12
    """Minimum number of fonts that draw a character, each differently, for it to be a class."""
    images_per_class: Annotated[PositiveInt, Field(le=100_000)] = 20
    """Images per character, at most 100,000: each a font and a small affine distortion."""
    distortion: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 1.0
    """Strength of the distortion: 1 is at most 10 degrees, 12% scale, 10% shear, 6% shift."""
    seed: Count = 0
    """Seed of the drawn instances."""


class OmniglotSource(_DataSource):
    """Omniglot (Lake et al. 2015): 1,623 characters of 50 alphabets, 20 drawings each."""

    kind: Literal["omniglot"]
    path: PathField
    """Folder of images_background and images_evaluation, as .zip files or as folders."""
    split: Literal["vinyals", "background_evaluation"] = "vinyals"
    """vinyals: 1028/172/423 characters (Vinyals et al. 2016); background_evaluation: the
    original 964/659 characters, the evaluation set as test and the last five background alphabets
    by name as val."""
    rotations: bool = True
    """Add each character turned by 90, 180 and 270 degrees as a class of its own (train only
    learns from more classes; val and test get them too, as in Santoro et al. 2016)."""


class ImageFolderSource(_DataSource):
    """Images of your own."""

    kind: Literal["image-folder"]
    path: PathField
    """Folder of <split>/<class>/<image> or <class>/<image>, or the root of a CSV's paths. Splits
    may be called train, training; val, valid, validation, dev; test, testing. Pictures in folders
    below a class folder are of that class."""
    csv: PathField | None = None
    """A CSV with header path,class,split instead of a folder layout: UTF-8, or UTF-16
    with its mark."""
    fractions: tuple[PositiveRate, PositiveRate, PositiveRate] = (0.64, 0.16, 0.2)
    """Shares of the classes that go to train, val and test when the folders name no split."""
    seed: Count = 0
    """Seed of the split by fractions."""
    mode: Literal["rgb", "gray"] = "rgb"
    """Colour (3 channels) or grey (1 channel)."""
    max_megapixels: Annotated[PositiveRate, Field(le=2000)] = 89.478485
    """Larger pictures are refused before they are decoded, millions of pixels (Pillow's limit). A
    picture takes up to 12 bytes a pixel of memory while it is read."""


class BenchmarkSource(_DataSource):
    """A published benchmark, whose classes and images are counted on import."""

    path: PathField
    """Folder of the files as they are distributed; their names do not matter."""
    verify_counts: bool = True
    """Refuse splits without the published numbers of classes and images; false accepts a part of
    the data set, for experiments."""


class MiniImageNetSource(BenchmarkSource):
    """mini-ImageNet (Vinyals et al. 2016, splits of Ravi and Larochelle 2017): 64/16/20 classes of
    600 images. The folder holds pickles of either kind (data and labels; image_data and
    class_dict), or images/ and CSVs (filename,label), or the class folders of ILSVRC 2012."""

    kind: Literal["mini-imagenet"]


class TieredImageNetSource(BenchmarkSource):
    """tiered-ImageNet (Ren et al. 2018): 351/97/160 classes, 779,165 images. The folder holds npz
    files of pixels or pickles of PNG files, and pickles of labels."""

    kind: Literal["tiered-imagenet"]


class CifarFsSource(BenchmarkSource):
    """CIFAR-FS (Bertinetto et al. 2019): 64/16/20 classes of 600 images. A folder of pickles, or
    CIFAR-100 for Python: cifar-100-python.tar.gz, the folder that holds it, or it unpacked."""

    kind: Literal["cifar-fs"]


class Fc100Source(BenchmarkSource):
    """FC100 (Oreshkin et al. 2018): 60/20/20 classes of 600 images, splits disjoint in superclass.
    A folder of pickles, or CIFAR-100 as for cifar-fs."""

    kind: Literal["fc100"]


class CubSource(BenchmarkSource):
    """CUB-200-2011 (Wah et al. 2011): 200 birds, 11,788 images. CUB_200_2011.tgz, the folder that
    holds it, or it unpacked."""

    kind: Literal["cub"]
    split: Literal["cub_100_50_50", "cub_140_30_30"]
    """Accuracies differ, so there is no default. cub_100_50_50: classes dealt by number
    (Hilliard et al. 2018); cub_140_30_30: Triantafillou et al. 2020."""
    crop_to_box: bool = False
    """Cut each bird out by its bounding box and scale it to the square; else the middle square
    of the whole image is taken."""


class INaturalist2017Source(BenchmarkSource):
    """iNaturalist 2017 as meta-iNat (Wertheimer and Hariharan 2019): images/ and
    fs-splits/{train,test}.csv, lines path,label without a header; 908/227 classes."""

    kind: Literal["inaturalist-2017"]
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the training classes that becomes val: the CSVs have none."""
    seed: Count = 0
    """Seed of the choice of these classes."""


AnySource = (
    GlyphsSource
    | OmniglotSource
    | ImageFolderSource
    | MiniImageNetSource
    | TieredImageNetSource
    | CifarFsSource
    | Fc100Source
    | CubSource
    | INaturalist2017Source
)
Source = Annotated[AnySource, Field(discriminator="kind")]
