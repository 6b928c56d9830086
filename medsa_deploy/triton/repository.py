"""Bundles → a Triton model repository: a folder of models, whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from medsa_deploy import __version__
from medsa_deploy.bundle.checked import check_bundle
from medsa_deploy.bundle.contents import bundle_files
from medsa_deploy.bundle.files import check_files
from medsa_deploy.bundle.folder import new_bundle
from medsa_deploy.bundle.manifest import Manifest, read_manifest
from medsa_deploy.bundle.signature import signature_paths
from medsa_deploy.errors import EngineError, EngineStaleError, UsageError
from medsa_deploy.nvidia.engines import (
    ENGINE_FILENAME,
    ENGINES_FOLDER,
    Engine,
    check_engine_files,
    load_engines,
    stale_role,
)

from .config_text import CONFIG_FILENAME, ModelConfig, config_text
from .models import (
    BundleOnServer,
    Graph,
    RepositoryOptions,
    graph_model,
    python_models,
    served_graphs,
    unique_name,
)

INDEX_FILENAME = "medsa-triton.json"
VERSION_FOLDER = "1"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
PYTHON_FILES = {"session": "session_model", "segment": "segment_model"}
"""Last part of a model's name → the module that runs it; graphs have `graph_model`."""
MODEL_TEXT = '''"""{name}. The server's Python needs medsa-deploy {version}.

If it is installed in a virtual environment, set MEDSA_SITE_PACKAGES to its site-packages: Triton's
python backend looks into no virtual environment, and not at PYTHONPATH.
"""

import os
import site

if "MEDSA_SITE_PACKAGES" in os.environ:
    site.addsitedir(os.environ["MEDSA_SITE_PACKAGES"])

from medsa_deploy.triton.{module} import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model of the repository."""

    name: str
    backend: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A repository that was written."""

    folder: Path
    version: str
    """Of the medsa-deploy that wrote it, and that its python models need."""
    bundles: dict[str, str]
    """Name of each bundle → SHA-256 of its manifest."""
    models: tuple[ServedModel, ...]


def write_repository(
    bundles: Sequence[Path],
    output: Path,
    options: RepositoryOptions | None = None,
    *,
    force: bool = False,
    trusted: tuple[Path, ...] | None = None,
) -> Repository:
    """Write the models of each bundle to a new folder, whole or not at all.

    `trusted`: see `medsa_deploy.load`. UsageError for an output that exists, unless `force`
    replaces an earlier repository, for bundles of one name and for a name that no model can have.
    BundleError for a bundle that cannot be used, or lacks the precision; EngineError if
    `tensorrt` is asked for and the bundle has no engines.

    >>> repository = write_repository([Path("liver.medsa")], Path("models"))
    >>> [model.name for model in repository.models]
    ['liver_session', 'liver_segment', 'liver_encoder', 'liver_decoder']
    """
    options = options or RepositoryOptions()
    _check_output(output, force=force)
    served: dict[str, tuple[Path, BundleOnServer]] = {}
    for path in bundles:
        bundle = _described(path, list(served), trusted)
        served[bundle.name] = path, bundle
    configs: list[ModelConfig] = []
    try:
        with new_bundle(output) as folder:
            for path, bundle in served.values():
                configs += _write_models(folder, path, bundle, options)
            repository = _repository(output, [bundle for _, bundle in served.values()], configs)
            text = json.dumps(asdict(replace(repository, folder=Path())), default=str, indent=2)
            (folder / INDEX_FILENAME).write_text(text + "\n", encoding="utf-8")
    except OSError as e:
        raise UsageError(
            f"{output} cannot be written ({e.strerror}): name another folder with -o"
        ) from e
    return repository


def _repository(
    output: Path, bundles: Sequence[BundleOnServer], configs: Sequence[ModelConfig]
) -> Repository:
    models = [
        ServedModel(
            name=config.name,
            backend=config.backend,
            inputs=tuple(tensor.name for tensor in config.inputs),
            outputs=tuple(tensor.name for tensor in config.outputs),
        )
        for config in configs
    ]
    return Repository(
        folder=output,
        version=__version__,
        bundles={bundle.name: bundle.sha256 for bundle in bundles},
        models=tuple(models),
    )


def _check_output(output: Path, *, force: bool) -> None:
    """UsageError unless a folder can be put at `output`; only an earlier repository is replaced."""
    if not output.parent.is_dir():
        raise UsageError(f"{output.parent} is not a folder: make it, or name another output")
    if not os.path.lexists(output) or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / INDEX_FILENAME).is_file():
        raise UsageError(
            f"{output} exists and is no repository that medsa-deploy wrote: name another folder "
            "with -o"
        )
    if not force:
        raise UsageError(
            f"{output} exists: replace it with --force, or name another folder with -o"
        )


def _described(
    path: Path, names: Sequence[str], trusted: tuple[Path, ...] | None
) -> BundleOnServer:
    """A bundle whose files and signers were checked."""
    checked = check_bundle(path, trusted)
    check_files(checked.manifest, path)
    name = path.resolve().stem
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be the name of a model: rename the bundle; expected letters, digits, "
            "_ and -"
        )
    return BundleOnServer(
        name=unique_name(name, names),
        folder=path.resolve().name,
        manifest=checked.manifest,
        sha256=read_manifest(path)[1],
    )


def _write_models(
    folder: Path, path: Path, bundle: BundleOnServer, options: RepositoryOptions
) -> list[ModelConfig]:
    """Write a bundle's models; the first python model holds its files, the others link to them."""
    configs = python_models(bundle, options)
    for config in configs:
        _write_python_model(folder, path, bundle, config)
    for graph in served_graphs(bundle.manifest, options):
        if options.backend == "python":
            config = graph_model(bundle, graph, options)
            _write_python_model(folder, path, bundle, config)
        elif options.backend == "onnxruntime":
            config = _write_onnx_model(folder, path, bundle, graph, options)
        else:
            config = _write_plan_model(folder, path, bundle, graph, options)
        configs.append(config)
    return configs


def _write_python_model(
    folder: Path, path: Path, bundle: BundleOnServer, config: ModelConfig
) -> None:
    version = _write_config(folder, config)
    kind = config.name.removeprefix(f"{bundle.name}_")
    module = PYTHON_FILES.get(kind, "graph_model")
    text = MODEL_TEXT.format(name=config.name, version=__version__, module=module)
    (version / "model.py").write_text(text, encoding="utf-8")
    first = folder / f"{bundle.name}_session" / VERSION_FOLDER / bundle.folder
    source = first if first.is_dir() else path
    for name in bundle_files(source):
        target = version / bundle.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        _copy(source / name, target, link=source is first)
    for signature in signature_paths(path):
        _copy(signature, version / signature.name, link=False)


def _write_onnx_model(
    folder: Path, path: Path, bundle: BundleOnServer, graph: Graph, options: RepositoryOptions
) -> ModelConfig:
    """A graph's ONNX file, and the files that hold its weights, under the names that it reads."""
    file = bundle.manifest.file(graph, options.precision)
    config = graph_model(bundle, graph, options, filename=file.path)
    version = _write_config(folder, config)
    weights = [f.path for f in bundle.manifest.files if f.role == "weights"]
    for name in (file.path, *weights):
        (version / name).parent.mkdir(parents=True, exist_ok=True)
        _copy(path / name, version / name, link=False)
    return config


def _write_plan_model(
    folder: Path, path: Path, bundle: BundleOnServer, graph: Graph, options: RepositoryOptions
) -> ModelConfig:
    """The engines of a graph, for every kind of GPU that the bundle has engines for."""
    plans = _plans(path, bundle.manifest, options.precision)
    names = {capability: f"model-{capability}.plan" for capability in plans}
    config = graph_model(
        bundle,
        graph,
        options,
        filename=next(iter(names.values())),
        capability_files=names,
        engine_batch=min(_largest_batch(engine, graph) for engine, _ in plans.values()),
    )
    version = _write_config(folder, config)
    for capability, (engine, engines) in plans.items():
        _copy(engines / engine.file(graph).path, version / names[capability], link=False)
    return config


def _largest_batch(engine: Engine, graph: Graph) -> int:
    """The largest first axis that every input of an engine takes."""
    return min(largest[0] for _, _, largest in engine.file(graph).profile.values())


def _plans(path: Path, manifest: Manifest, precision: str) -> dict[str, tuple[Engine, Path]]:
    """Compute capability, such as 8.6, → TensorRT's engines for it and their folder.

    EngineError if there are none, or if one is stale or changed.
    """
    plans = {}
    for described in sorted((path / ENGINES_FOLDER).glob(f"*/{ENGINE_FILENAME}")):
        engine = load_engines(described.parent)
        if (engine.options.flavor, engine.options.precision) != ("tensorrt", precision):
            continue
        again = "build the engines again with medsa-deploy build-engine"
        if role := stale_role(engine, manifest):
            raise EngineStaleError(
                f"{described.parent}: its {role} was built from another ONNX file than the bundle "
                f"holds now: {again}"
            )
        check_engine_files(engine, described.parent, again)
        for target in engine.options.targets:
            digits = target.removeprefix("sm")
            plans[f"{digits[:-1]}.{digits[-1]}"] = engine, described.parent
    if not plans:
        raise EngineError(
            f"{path} holds no TensorRT engines in {precision}: build them on the server's kind of "
            f"GPU with medsa-deploy build-engine {path} --flavor tensorrt"
        )
    return plans


def _write_config(folder: Path, config: ModelConfig) -> Path:
    """Write a model's configuration; its version's folder."""
    version = folder / config.name / VERSION_FOLDER
    version.mkdir(parents=True)
    (version.parent / CONFIG_FILENAME).write_text(config_text(config), encoding="utf-8")
    return version


def _copy(source: Path, target: Path, *, link: bool) -> None:
    """Copy a file; a hard link instead, if asked for and if the file system has them."""
    if link:
        try:
            os.link(source, target)
            return
        except OSError:
            pass  # a file system without links: a copy takes its place
    shutil.copyfile(source, target)
