"""The sixteen categories of the cue-conflict stimuli, with their classes of ImageNet, CIFAR-10 and STL-10.

Source: Geirhos et al. 2019, arXiv 1811.12231, and their released code, which maps the 207 WordNet ids.
"""

from collections.abc import Sequence

import numpy as np

# Category -> WordNet ids of ILSVRC 2012, without the "n".
_IDS = {
    "airplane": "02690373",
    "bear": "02132136 02133161 02134084 02134418",
    "bicycle": "02835271 03792782",
    "bird": """
        01514859 01530575 01531178 01532829 01534433 01537544 01558993 01560419 01582220 01592084 01601694
        01614925 01616318 01622779 01795545 01796340 01797886 01798484 01817953 01818515 01819313 01820546
        01824575 01828970 01829413 01833805 01843065 01843383 01855032 01855672 01860187 02002556 02002724
        02006656 02007558 02009229 02009912 02011460 02013706 02017213 02018207 02018795 02025239 02027492
        02028035 02033041 02037110 02051845 02056570
    """,
    "boat": "02951358 03344393 03662601 04273569 04612504",
    "bottle": "02823428 03937543 03983396 04557648 04560804 04579145 04591713",
    "car": "02814533 03100240 04285008",
    "cat": "02123045 02123159 02123394 02123597 02124075 02125311",
    "chair": "02791124 03376595 04099969 04429376",
    "clock": "02708093 03196217 04548280",
    "dog": """
        02085782 02085936 02086079 02086240 02086646 02086910 02087046 02087394 02088094 02088238 02088364
        02088466 02088632 02089078 02089867 02089973 02090379 02090622 02090721 02091032 02091134 02091244
        02091467 02091635 02091831 02092002 02092339 02093256 02093428 02093647 02093754 02093859 02093991
        02094114 02094258 02094433 02095314 02095570 02095889 02096051 02096294 02096437 02096585 02097047
        02097130 02097209 02097298 02097474 02097658 02098105 02098286 02099267 02099429 02099601 02099712
        02099849 02100236 02100583 02100735 02100877 02101006 02101388 02101556 02102040 02102177 02102318
        02102480 02102973 02104029 02104365 02105056 02105162 02105251 02105505 02105641 02105855 02106030
        02106166 02106382 02106550 02106662 02107142 02107312 02107574 02107683 02107908 02108000 02108422
        02108551 02108915 02109047 02109525 02109961 02110063 02110185 02110627 02110806 02110958 02111129
        02111277 02111500 02112018 02112350 02112706 02113023 02113624 02113712 02113799 02113978
    """,
    "elephant": "02504013 02504458",
    "keyboard": "03085013 04505470",
    "knife": "03041632",
    "oven": "04111531",
    "truck": "03345487 03417042 03770679 03796401 03930630 03977966 04461696 04467665",
}

# Category -> names of classes: those of ImageNet, in the usual spelling, except dogs and birds; and of small sets.
_NAMES = {
    "airplane": "airliner, plane, aeroplane",
    "bear": "brown bear, American black bear, black bear, ice bear, polar bear, sloth bear",
    "bicycle": "bicycle-built-for-two, tandem bicycle, mountain bike",
    "bird": "",
    "boat": "canoe, fireboat, lifeboat, speedboat, yawl, ship",
    "bottle": "beer bottle, pill bottle, pop bottle, water bottle, water jug, whiskey jug, wine bottle",
    "car": "beach wagon, station wagon, convertible, sports car, automobile",
    "cat": "tabby, tabby cat, tiger cat, Persian cat, Siamese cat, Egyptian cat, cougar",
    "chair": "barber chair, folding chair, rocking chair, throne",
    "clock": "analog clock, digital clock, wall clock",
    "dog": "",
    "elephant": "Indian elephant, Asian elephant, African elephant",
    "keyboard": "computer keyboard, typewriter keyboard",
    "knife": "cleaver",
    "oven": "rotisserie",
    "truck": "fire engine, fire truck, garbage truck, minivan, moving van, pickup, pickup truck, police van, "
    "tow truck, trailer truck, semi-trailer truck",
}

CATEGORIES = tuple(_IDS)


def plain(name: str) -> str:
    """A class name without differences in spelling between sets: lower case, with single spaces."""
    return " ".join(name.replace("_", " ").lower().split())


_OF_CLASS = {
    plain(word): i
    for i, category in enumerate(CATEGORIES)
    for word in (category, *(f"n{id_}" for id_ in _IDS[category].split()), *_NAMES[category].split(","))
    if word.strip()
}


def category_of(class_names: Sequence[str]) -> np.ndarray:
    """The category of each class, int [K] into CATEGORIES, -1 for classes in none.

    class_names: WordNet ids or names; among synonyms, separated by commas, the first known one counts.
    """

    def find(name: str) -> int:
        return next((i for word in (name, *name.split(",")) if (i := _OF_CLASS.get(plain(word), -1)) >= 0), -1)

    return np.array([find(name) for name in class_names], int)
