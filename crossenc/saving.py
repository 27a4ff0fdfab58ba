"""Writing checkpoints: one folder that this library, transformers and sentence-transformers 4 to 6 load alike.

    config.json, *.safetensors, tokenizer files   transformers' own
    modules.json and two settings files           the parts and the activation, as sentence-transformers 6 reads them
    1_Pooling/, 2_Dense/ …                        parts after the Transformer

The activation also stands in config.json, where versions 4 and 5 and several serving programs look for it.
"""

import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub import HfApi

from crossenc.activations import activation_name, is_told_by_name
from crossenc.adapters import has_adapters, save_adapter
from crossenc.card import ModelFacts, write_card
from crossenc.chat import ChatTokenizer
from crossenc.checkpoint import ADAPTER_FILE
from crossenc.deprecation import accepts_old_arguments, warn_deprecated
from crossenc.errors import ConfigError
from crossenc.layout import MODULES_FILE, OWN_SETTINGS_FILE, TRANSFORMER_FILE
from crossenc.modules import Part, Transformer
from crossenc.onnx.backend import FOLDER as ONNX_FOLDER
from crossenc.quiet import quiet_transformers

if TYPE_CHECKING:
    from crossenc.model import CrossEncoder

logger = logging.getLogger(__name__)

#: The version of sentence-transformers whose layout this is.
_LAYOUT_VERSION = "6.2.0"


class SaveMixin:
    """Gives CrossEncoder its `save_pretrained` and `push_to_hub`."""

    def save_pretrained(
        self,
        path: str | Path,
        model_name: str | None = None,
        create_model_card: bool = True,
        train_datasets: Sequence[str] | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """Write a checkpoint folder that this library, sentence-transformers 4 to 6 and transformers load.

        Of a model with an adapter the adapter in use is written, without the base model, which its file names.
        With `create_model_card` a README.md is among it: the one that the checkpoint came with, unless the model was
        trained here. `model_name` and `train_datasets` (hub ids) are for the card. Weights are always written as
        safetensors, whatever `safe_serialization` is. An activation that cannot be told by its name is not kept, with
        a warning.

        Raises CheckpointError while the head is new and random.
        """
        if not safe_serialization:
            warn_deprecated("The save_pretrained `safe_serialization` argument is deprecated: it has no effect")
        model = cast("CrossEncoder", self)
        model.engine  # noqa: B018 - raises while the head is new
        card = model.model_card_data
        card.model_name = model_name or card.model_name
        if train_datasets:
            card.train_datasets = [{"id": name, "name": name} for name in train_datasets]
        save_checkpoint(model, Path(path), create_model_card)

    def save(self, path: str | Path, *arguments: Any, **settings: Any) -> None:
        """The same as `save_pretrained`."""
        self.save_pretrained(path, *arguments, **settings)

    def push_to_hub(  # noqa: PLR0913 - the order that users of this method's namesake may rely on
        self,
        repo_id: str,
        token: str | None = None,
        private: bool | None = None,
        safe_serialization: bool = True,
        commit_message: str | None = None,
        local_model_path: str | Path | None = None,
        exist_ok: bool = False,
        replace_model_card: bool = False,
        train_datasets: Sequence[str] | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        *,
        tags: str | Sequence[str] | None = None,
    ) -> str:
        """Upload the checkpoint to the Hugging Face hub and return the URL of the commit or pull request.

        `local_model_path` is a saved folder to upload in place of this model. `exist_ok` allows a repository that
        exists, whose card stays unless `replace_model_card`. `revision` is a branch, made where it is missing. `tags`
        and `train_datasets` (hub ids) are for the card. Weights are always safetensors.
        """
        if not safe_serialization:
            warn_deprecated("The push_to_hub `safe_serialization` argument is deprecated: weights are safetensors")
        model = cast("CrossEncoder", self)
        api = HfApi(token=token)
        place = api.create_repo(repo_id, private=private, exist_ok=exist_ok or create_pr, repo_type="model")
        if revision is not None:
            api.create_branch(place.repo_id, branch=revision, exist_ok=True)
        card = model.model_card_data
        card.model_id = place.repo_id
        card.tags = [*card.tags, *([tags] if isinstance(tags, str) else tags or ())]
        keeps_card = (exist_ok or create_pr) and not replace_model_card and _may_have_card(api, place.repo_id, revision)
        with tempfile.TemporaryDirectory() as folder:
            upload = local_model_path
            if upload is None:
                upload = os.path.join(folder, "model")
                self.save_pretrained(upload, create_model_card=not keeps_card, train_datasets=train_datasets)
            done = api.upload_folder(
                repo_id=place.repo_id,
                folder_path=str(upload),
                commit_message=commit_message or "Add a cross-encoder",
                commit_description=f"A CrossEncoder:\n\n```\n{model}\n```" if create_pr else None,
                revision=revision,
                create_pr=create_pr,
            )
        return str(done.pr_url or done.commit_url if create_pr else done.commit_url)

    @accepts_old_arguments({"repo_name": "repo_id"})
    def save_to_hub(  # noqa: PLR0913
        self,
        repo_id: str,
        organization: str | None = None,
        token: str | None = None,
        private: bool | None = None,
        safe_serialization: bool = True,
        commit_message: str | None = None,
        local_model_path: str | Path | None = None,
        exist_ok: bool = False,
        replace_model_card: bool = False,
        train_datasets: Sequence[str] | None = None,
    ) -> str:
        """The old name of `push_to_hub`; `organization` is the part of `repo_id` before the slash."""
        warn_deprecated("save_to_hub is deprecated: call push_to_hub", 4)  # through the decorator
        owner, _, name = repo_id.rpartition("/")
        if organization and owner not in ("", organization):
            raise ConfigError(f"{repo_id} is not of the organization {organization}: leave organization out")
        return self.push_to_hub(
            f"{organization}/{name}" if organization else repo_id,
            token,
            private,
            safe_serialization,
            commit_message,
            local_model_path,
            exist_ok,
            replace_model_card,
            train_datasets,
        )


def _may_have_card(api: HfApi, repo_id: str, revision: str | None) -> bool:
    """Whether a repository of the hub has a README.md; also true where the hub does not say."""
    try:
        return bool(api.file_exists(repo_id, "README.md", revision=revision))
    except Exception:  # what was uploaded before must not be lost for want of an answer
        logger.warning("whether %s has a model card could not be found out: none is uploaded", repo_id, exc_info=True)
        return True


def save_checkpoint(model: "CrossEncoder", folder: Path, create_model_card: bool = True) -> None:
    """Write `model` to `folder`, with a README.md if asked for.

    What a kill leaves is never a folder that looks complete but is not. Files of an earlier checkpoint there are
    replaced; other files stay.
    """
    folder = folder.resolve()
    name = f".{uuid.uuid4().hex[:8]}.unfinished"
    # Files are moved, so they are made on the same disk: a folder that is there may be a mount.
    unfinished = folder / name if folder.exists() else folder.with_name(folder.name + name)
    unfinished.mkdir(parents=True)
    if not is_told_by_name(model.activation_fn):
        logger.warning(
            "the activation %s cannot be loaded again by its name alone: pass activation_fn when you load %s",
            model.activation_fn,
            folder.name,
        )
    try:
        _write_parts(model, unfinished)
        _write_settings(model, unfinished)
        if model.onnx_network is not None:
            model.onnx_network.save(unfinished / ONNX_FOLDER)
        if create_model_card:
            write_readme(model, unfinished)
        if not folder.exists():
            os.replace(unfinished, folder)
            return
        for name in (MODULES_FILE, "config.json", ADAPTER_FILE):  # a whole model has no adapter, an adapter no config
            (folder / name).unlink(missing_ok=True)
        for stale in [*folder.glob("*.safetensors*"), *(folder / ONNX_FOLDER).glob("*.onnx*")]:
            stale.unlink()
        files = [path for path in unfinished.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path.name == MODULES_FILE):  # it makes the folder a checkpoint
            place = folder / path.relative_to(unfinished)
            place.parent.mkdir(exist_ok=True)
            os.replace(path, place)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_parts(model: "CrossEncoder", folder: Path) -> None:
    config = model.config
    stale = {"sbert_ce_default_activation_function", "sentence_transformers"}
    for name in stale & set(vars(config)):
        delattr(config, name)
    config.sentence_transformers = {"activation_fn": activation_name(model.activation_fn), "version": _LAYOUT_VERSION}
    tokenizer = model.tokenizer
    tokenizer.backend_tokenizer.no_truncation()  # or the limits of the last call would be saved
    tokenizer.backend_tokenizer.no_padding()
    with quiet_transformers():
        if has_adapters(model.model):
            save_adapter(model, folder)
        else:
            model.model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
    for place, part in _places(model):
        if place:
            part.save(folder / place)


def write_readme(model: "CrossEncoder", folder: Path) -> None:
    """Write the model's card: the one it came with, unless it was trained or evaluated here."""
    data = model.model_card_data
    if model.readme is not None and not data.was_trained and not data.evaluations:
        (folder / "README.md").write_text(model.readme, encoding="utf-8")
        return
    facts = ModelFacts(
        base_model=data.base_model,
        base_revision=data.base_revision,
        max_length=model.max_length,
        num_labels=model.num_labels,
        activation=activation_name(model.activation_fn),
        architecture=str(model),
    )
    write_card(folder, data, facts)


def _places(model: "CrossEncoder") -> list[tuple[str, Any]]:
    """Each part with its folder; the Transformer lies in the checkpoint's own."""
    return [(f"{i}_{type(part).__name__}" if i else "", part) for i, part in enumerate(model)]


def _write_settings(model: "CrossEncoder", folder: Path) -> None:
    transformer = model[0]
    assert isinstance(transformer, Transformer)
    output, key = Transformer.OUTPUTS[transformer.task]
    text = {"method": "forward", "method_output_name": output}
    settings: dict[str, Any] = {
        "transformer_task": transformer.task,
        "modality_config": {"text": text},
        "module_output_name": key,
    }
    if model.processing_settings:
        settings["processing_kwargs"] = model.processing_settings
    if isinstance(model.pair_tokenizer(), ChatTokenizer):
        settings["modality_config"]["message"] = {**text, "format": "flat"}
    modules = [
        {"idx": i, "name": str(i), "path": place, "type": type(part).saved_type}
        for i, (place, part) in enumerate(_places(model))
        if isinstance(part, Part | Transformer)
    ]
    own = {
        "__version__": {
            "crossenc": version("crossenc"),
            "pytorch": torch.__version__,
            "sentence_transformers": _LAYOUT_VERSION,
            "transformers": version("transformers"),
        },
        "activation_fn": activation_name(model.activation_fn),
        "default_prompt_name": model.default_prompt_name,
        "model_type": "CrossEncoder",
        "prompts": dict(model.prompts),
        **({"keep_in_fp32_modules": model.keep_in_fp32_modules} if model.keep_in_fp32_modules else {}),
    }
    for name, content in ((TRANSFORMER_FILE, settings), (OWN_SETTINGS_FILE, own), (MODULES_FILE, modules)):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=isinstance(content, dict)))
