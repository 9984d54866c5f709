import os

import pytest

from schemas.errors import UserError


def test_every_file_below_a_class_folder_is_an_item(pictures, write, read, tmp_path):
    data = next(iter(pictures.values()))
    for name in ("owl/a.jpg", "owl/deep/er/b", "owl/x.jpg/c.png", "owl/notes.txt", "fox/1.JPEG"):
        write.file(f"{tmp_path}/{name}", data)
    for name in ("owl/.DS_Store", ".cache/owl/a.jpg", "fox/.thumbs/1.jpg"):
        write.file(f"{tmp_path}/{name}", data)
    items, _ = read("imagefolder", tmp_path)
    found = [(item.label, item.origin) for item in items]
    names = ["fox/1.JPEG", "owl/a.jpg", "owl/deep/er/b", "owl/notes.txt", "owl/x.jpg/c.png"]
    assert found == [(name.split("/")[0], name) for name in names]


def test_a_file_outside_a_class_folder_is_counted_and_refused(pictures, write, read, tmp_path):
    write.imagefolder(str(tmp_path), pictures)
    write.file(f"{tmp_path}/cover.jpg", next(iter(pictures.values())))
    items, admission = read("imagefolder", tmp_path)
    assert len(items) == len(pictures) + 1
    (refused,) = admission.quarantined
    assert (refused.origin, refused.label, refused.reason) == ("cover.jpg", "", "not inside a class folder")


def test_links_are_followed_but_not_in_circles(pictures, write, read, tmp_path):
    root, elsewhere = tmp_path / "refs", tmp_path / "elsewhere"
    write.imagefolder(str(root), pictures)
    write.file(f"{elsewhere}/a.jpg", pictures["red_star", "0.jpg"])
    (root / "linked").symlink_to(elsewhere)
    (root / "red_star" / "up").symlink_to(root)
    (root / "red_star" / "broken.jpg").symlink_to(root / "gone.jpg")
    os.mkfifo(root / "red_star" / "pipe")  # reading it would wait for ever
    items, admission = read("imagefolder", root)
    assert len(items) == len(pictures) + 1 + 3
    assert {r.origin for r in admission.admitted} > {"linked/a.jpg"}
    assert {q.origin: q.reason for q in admission.quarantined} == dict.fromkeys(
        ["red_star/up", "red_star/broken.jpg", "red_star/pipe"], "not a file (broken link or device)"
    )


def test_a_name_that_is_not_unicode_is_kept_printable(pictures, write, read, tmp_path):
    write.imagefolder(str(tmp_path), pictures)
    data = pictures["red_star", "0.jpg"] + b"\0"
    with open(os.fsencode(tmp_path) + b"/red_star/\xff.jpg", "wb") as file:
        file.write(data)
    items, admission = read("imagefolder", tmp_path)
    (odd,) = [item for item in items if "\\xff" in item.origin]
    assert odd.origin.encode() == b"red_star/\\xff.jpg"
    assert odd.read() == data
    assert not admission.quarantined


def test_an_empty_class_folder_is_named(pictures, write, read, tmp_path):
    write.imagefolder(str(tmp_path), pictures)
    write.file(f"{tmp_path}/heron/.keep", b"")
    with pytest.raises(UserError, match=r"class folder 'heron' .* has no files"):
        read("imagefolder", tmp_path)


def test_a_file_in_place_of_the_folder_is_named(write, read, tmp_path):
    write.file(f"{tmp_path}/refs", b"")
    with pytest.raises(UserError, match="is not a folder; give a folder with one subfolder"):
        read("imagefolder", tmp_path / "refs")


def test_images_without_class_folders_are_no_source(pictures, write, read, tmp_path):
    write.file(f"{tmp_path}/a.jpg", next(iter(pictures.values())))
    with pytest.raises(UserError, match="no images in subfolders"):
        read("imagefolder", tmp_path)


def test_a_file_too_long_is_not_read_to_its_end(pictures, write, read, tmp_path):
    write.imagefolder(str(tmp_path), pictures)
    os.truncate(tmp_path / "red_star" / "0.jpg", 1 << 40)  # 1 TiB of zeros that take no space
    _, admission = read("imagefolder", tmp_path, max_bytes=100_000)
    (refused,) = admission.quarantined
    assert (refused.origin, refused.sha256) == ("red_star/0.jpg", "")
    assert refused.reason == "more than 100000 bytes"


def test_an_io_error_stops_the_build(pictures, write, read, tmp_path, monkeypatch):
    from fsspec.implementations.local import LocalFileSystem

    write.imagefolder(str(tmp_path), pictures)
    opened = LocalFileSystem._open

    def failing(self, path, *args, **kwargs):
        if path.endswith("red_star/1.png"):
            raise OSError(5, "Input/output error")
        return opened(self, path, *args, **kwargs)

    monkeypatch.setattr(LocalFileSystem, "_open", failing)
    with pytest.raises(OSError, match="Input/output error"):
        read("imagefolder", tmp_path)
