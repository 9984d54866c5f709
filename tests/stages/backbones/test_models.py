"""A worker's scoring models are loaded once."""

from concurrent.futures import ThreadPoolExecutor


def test_each_model_is_loaded_once_whoever_asks(models):
    with ThreadPoolExecutor(4) as pool:
        clips = set(pool.map(models.clip, ["tangram"] * 8))
        classifiers = set(pool.map(models.classifier, ["tangram"] * 8))
    assert len(clips) == len(classifiers) == 1


def test_classes_are_known_without_loading(models):
    assert models.classes("tangram") == models.classifier("tangram").classes


def test_fingerprints_tell_models_apart(models):
    assert models.fingerprint("clip", "tangram") != models.fingerprint("classifier", "tangram")
