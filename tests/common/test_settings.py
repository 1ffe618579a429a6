import pytest

from upcycled_moe.common.settings import SettingsError, check_keys, load_yaml, parse_override


def test_known_keys_pass():
    check_keys({"seed": 1}, ["seed", "router"], "recipe.yaml")


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("num_expert", "did you mean 'num_experts'?"),
        ("zzz", "allowed: num_experts, seed."),
        (7, "allowed: num_experts, seed."),
    ],
)
def test_an_unknown_key_names_its_origin_and_the_nearest_key(key, hint):
    with pytest.raises(SettingsError) as error:
        check_keys({key: 1}, ["seed", "num_experts"], "recipe.yaml")
    assert str(error.value) == f"recipe.yaml: unknown key {key!r}; {hint}"


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("a: 1e-4\nb: 1.5\nc: [x, y]", {"a": 1e-4, "b": 1.5, "c": ["x", "y"]}),
        ("a: 5e3", {"a": 5000.0}),
        ("a: e4\nb: 1e", {"a": "e4", "b": "1e"}),
        ("", {}),
        ("# only a comment", {}),
    ],
)
def test_yaml_is_read_as_people_mean_it(tmp_path, text, settings):
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    assert load_yaml(path) == settings


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- b", "expected keys and values, got list"),
        (b"a: [1", "not a YAML file"),
        (b"\xff\xfe\xff", "not a YAML file"),
        (b"!!python/object/apply:os.system ['true']", "not a YAML file"),
    ],
)
def test_a_file_that_holds_no_settings_is_refused(tmp_path, content, message):
    path = tmp_path / "settings.yaml"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=message) as error:
        load_yaml(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"absent\.yaml: cannot be read \(No such file or directory\)"):
        load_yaml(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("learning_rate=1e-4", "learning_rate", 1e-4),
        ("files=[a, b]", "files", ["a", "b"]),
        ("name=a=b", "name", "a=b"),
        ("flag=true", "flag", True),
        ("nothing=", "nothing", None),
    ],
)
def test_an_override_is_read_as_yaml(argument, key, value):
    assert parse_override(argument) == (key, value)


@pytest.mark.parametrize("argument", ["seed", "=1", "a b=1", "a=[1"])
def test_an_override_that_is_none_is_refused(argument):
    with pytest.raises(SettingsError):
        parse_override(argument)
