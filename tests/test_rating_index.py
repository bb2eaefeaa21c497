from dspo.data.rating_index import RatingIndex
from dspo.data.readers.comparison import Comparison, rating_row


def test_an_image_against_itself_and_a_pair_that_comes_again_are_left_out() -> None:
    images = {"pair": (b"one", b"two"), "turned": (b"two", b"one"), "itself": (b"one", b"one")}
    rows = {name: rating_row(Comparison("here", "a cup", both, {"overall": 1.0}), 0) for name, both in images.items()}
    with RatingIndex() as index:
        assert [name for name, row in rows.items() if index.add(row, "train")] == ["pair"]
        assert index.summary("train")["pairs"] == 1
