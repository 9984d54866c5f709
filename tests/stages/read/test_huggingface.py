import datasets
import pytest

from schemas.errors import UserError


def test_a_folder_of_images_gives_its_folders_as_labels(pictures, write, read, tmp_path):
    write.imagefolder(str(tmp_path / "refs"), pictures)
    items, admission = read("huggingface", tmp_path / "refs")
    assert sorted((item.label, item.read()) for item in items) == sorted(
        (label, data) for (label, _), data in pictures.items()
    )
    assert not admission.quarantined


def test_a_folder_of_parquet_and_its_splits(pictures, write, read, tmp_path):
    data = list(pictures.values())
    for split, rows in (("train", data[:3]), ("test", data[3:])):
        columns = {"image": [{"bytes": d, "path": None} for d in rows], "label": [2] * len(rows)}
        table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        (tmp_path / "refs").mkdir(exist_ok=True)
        table.to_parquet(str(tmp_path / "refs" / f"{split}.parquet"))
    for split, rows in (("train", data[:3]), ("test", data[3:])):
        items, _ = read("huggingface", tmp_path / "refs", split=split)
        assert [(item.origin, item.label, item.read()) for item in items] == [
            (f"{split}/{n:09d}", "2", d) for n, d in enumerate(rows)
        ]
    with pytest.raises(UserError, match=r'cannot be loaded \(Unknown split "validation"'):
        read("huggingface", tmp_path / "refs", split="validation")


def test_what_save_to_disk_wrote(pictures, read, tmp_path):
    data = list(pictures.values())[:3]
    columns = {
        "picture": [{"bytes": data[0], "path": None}, None, {"bytes": data[2], "path": None}],
        "kind": ["owl", "fox", None],
        "raw": data,
    }
    table = datasets.Dataset.from_dict(columns).cast_column("picture", datasets.Image())
    table.save_to_disk(str(tmp_path / "one"))
    items, admission = read("huggingface", tmp_path / "one", image="picture", label="kind")
    assert [item.label for item in items] == ["owl", "fox", ""]
    assert [q.reason for q in admission.quarantined] == ["no image in the row", "no label"]
    items, _ = read("huggingface", tmp_path / "one", image="raw", label="kind")
    assert [item.read() for item in items[:2]] == data[:2]
    with pytest.raises(
        UserError, match=r"references\.image: .* no column 'image'; it has picture, kind, raw"
    ):
        read("huggingface", tmp_path / "one")
    datasets.DatasetDict({"a": table, "b": table}).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(UserError, match=r"references\.split: .* has no split 'train'; it has a, b"):
        read("huggingface", tmp_path / "two")


def test_a_class_label_of_minus_one_is_no_label(pictures, read, tmp_path):
    data = list(pictures.values())[:2]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["owl", "fox"])}
    )
    columns = {"image": [{"bytes": d, "path": None} for d in data], "label": [-1, 1]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path))
    _, admission = read("huggingface", tmp_path)
    assert [r.label for r in admission.admitted] == ["fox"]
    assert len(admission.quarantined) == 1


def test_an_unreachable_hub_is_one_line(read):
    with pytest.raises(UserError, match=r"references\.uri: 'somebody/flowers' cannot be loaded") as caught:
        read("huggingface", "somebody/flowers")
    assert "\n" not in str(caught.value)
