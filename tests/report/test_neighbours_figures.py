"""Pictures of neighbours: every image is where its title is, and odd sets have a picture too."""

import numpy as np

from jaxcl.report import neighbours

RNG = np.random.default_rng(0)


def pixels_at(drawn, title):
    """The middle of the part of a figure that has this title, RGB."""
    figure = drawn.figure
    figure.canvas.draw()
    page = np.asarray(figure.canvas.buffer_rgba())
    ((x, y, w, h, _),) = [t for t in drawn.titles if t[4] == title]
    assert 0 <= x and 0 <= y and x + w <= 1 and y + h <= 1
    return page[round((y + h / 2) * page.shape[0]), round((x + w / 2) * page.shape[1]), :3].tolist()


def flat(*shape):
    """Images of one colour each."""
    colours = RNG.integers(0, 256, (*shape, 3)).astype(np.uint8)
    return np.broadcast_to(colours[..., None, None, :], (*shape, 8, 8, 3)), colours


def test_neighbours_stand_beside_their_image():
    (queries, query_colours), (found, colours) = flat(3), flat(3, 11)
    names = [["q", "b"][i == 1] + f"/{i}.jpg" for i in range(3)]
    found_names = [[f"{r}-{c}" for c in range(11)] for r in range(3)]
    cosine = np.linspace(1, 0, 33).reshape(3, 11)
    for agree in (None, RNG.choice([0, 1, np.nan], (3, 11))):
        drawn = neighbours.neighbour_grid(queries, found, cosine, agree, names, found_names)
        assert len(drawn.titles) == 3 * 9
        for r in range(3):
            assert pixels_at(drawn, names[r]) == query_colours[r].tolist()
            for c in (0, 7):
                title = f"{r}-{c}, cosine {cosine[r, c]:.3f}"
                assert pixels_at(drawn, title) == colours[r, c].tolist()


def test_clusters_are_rows_and_odd_ones_have_their_names():
    parts = [flat(n) for n in (8, 3)]
    names = [[f"{g}/{i}.png" for i in range(len(images))] for g, (images, _) in enumerate(parts)]
    drawn = neighbours.cluster_grid([images for images, _ in parts], names, [20, 3], 4)
    for called, (_, colours) in zip(names, parts, strict=True):
        for name, colour in zip(called, colours, strict=True):
            assert pixels_at(drawn, name) == colour.tolist()
    images, colours = flat(20)
    odd = np.linspace(1, 0.5, 20)
    drawn = neighbours.odd_grid(images, [f"{i}.png" for i in range(20)], odd)
    for i in range(20):
        assert pixels_at(drawn, f"{i}.png, {odd[i]:.3f}") == colours[i].tolist()


def test_groups_of_near_duplicates():
    sizes = (2, 12, 3, 2, 2)
    parts = [flat(min(n, 8)) for n in sizes]
    names = [[f"{g}/{i}" for i in range(n)] for g, n in enumerate(sizes)]
    drawn = neighbours.duplicate_grid([images for images, _ in parts], names)
    assert len(drawn.titles) == 2 + 8 + 3 + 2 + 2
    for g, (_, colours) in enumerate(parts):
        for i in range(len(colours)):
            assert pixels_at(drawn, f"{g}/{i}") == colours[i].tolist()
    assert "and 4 more" in [t.get_text() for t in drawn.figure.axes[0].texts]


def test_what_a_tile_calls_its_file():
    """Copies of one photo under names that differ at either end are told apart."""
    assert neighbours.shortened("folder/IMG_1.jpg", 130) == "IMG_1.jpg"
    assert neighbours.shortened("folder/photo00001.jpg", 130) == "photo00001"
    assert neighbours.shortened("folder/very-long-photo-00001.jpg", 130) == "ver…-00001"
    assert neighbours.shortened("folder/very-long-again-00001.jpeg", 130) == "ver…-00001"
    assert neighbours.shortened("folder/again-very-long-00001.jpg", 130) == "aga…-00001"
