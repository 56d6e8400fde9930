"""Configs and data manifests by path or by name; some are installed with the package.

The contract:
- A file of that path wins. A plain name such as `default` is looked for as `<folder>/default.yaml`
  in the working directory, then in the package.
- A name that is found nowhere is a ConfigError that lists the names there are.
"""

from __future__ import annotations

from pathlib import Path

from cdp.errors import ConfigError

CONFIGS, MANIFESTS = "configs", "data_manifests"
PACKAGE = Path(__file__).parent
"""Holds both folders: links to those of the repository in a checkout, files once installed."""


def find_config(given: str | Path) -> Path:
    """The file of a config, e.g. of `default` or `configs/mine.yaml`."""
    return _find(Path(given), CONFIGS, [Path()])


def find_manifest(given: str | Path, config: Path | None = None) -> Path:
    """The file of a data manifest, e.g. of `synthetic` or `data_manifests/mine.yaml`.

    config : the config that names it; a relative path may also start at its folder, or at the
        parent of its folder.
    """
    beside = [] if config is None else list(config.resolve().parents[:2])
    return _find(Path(given), MANIFESTS, [Path(), *beside])


def list_packaged(folder: str) -> list[str]:
    """The names of the configs or manifests in the package, sorted."""
    return sorted(path.stem for path in (PACKAGE / folder).glob("*.yaml"))


def _find(given: Path, folder: str, roots: list[Path]) -> Path:
    is_name = given.name == str(given) and not given.suffix
    tried = [root / given for root in roots]
    if is_name:
        tried += [root / folder / f"{given}.yaml" for root in [*roots, PACKAGE]]
    found = next((path for path in tried if path.is_file()), None)
    if found is None and is_name:
        raise ConfigError(
            f"no {folder}/{given}.yaml in the working directory or the package. Give the path of "
            f"a YAML file, or one of: {', '.join(list_packaged(folder))}"
        )
    if found is None and len(roots) > 1 and not given.is_absolute():
        places = ", ".join(str(root.resolve()) for root in roots)
        raise ConfigError(f"no file {given} in any of these folders: {places}")
    return found or given
