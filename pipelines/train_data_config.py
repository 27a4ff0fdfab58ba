"""The settings that say where labelled data is and how it is laid out: a part of a training job's YAML file.

It knows nothing of how the data is read. All of it changes what training sees (`result_options`).
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

LabelledLayout = Literal["pairs", "tuples", "lists", "ids", "flagembedding", "triples"]


class LabelledData(BaseModel):
    """Labelled data. A path alone, or a list of them, stands for `{files: …}`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    files: Annotated[
        str | tuple[str, ...],
        Field(description="file, folder or glob, or a list: Parquet, .jsonl, .tsv, or a dataset of save_to_disk"),
    ]
    layout: Annotated[Literal["auto"] | LabelledLayout, Field(description="shape of the rows")] = "auto"
    columns: Annotated[dict[str, str], Field(description="role -> column name, where the usual names differ")] = {}
    queries: Annotated[str | None, Field(description="table query_id, text (ids, and triples of ids)")] = None
    corpus: Annotated[str | None, Field(description="table doc_id, text[, title] (ids, and triples of ids)")] = None
    group: Annotated[
        bool | None, Field(description="rows of one query that stand together are a list; as loss, or validation, need")
    ] = None
    max_documents: Annotated[int | None, Field(ge=1, description="of a list; positives are kept first")] = None

    @model_validator(mode="before")
    @classmethod
    def _from_files(cls, value: Any) -> Any:
        return {"files": value} if isinstance(value, str | list | tuple) else value

    @model_validator(mode="after")
    def _consistent(self) -> "LabelledData":
        if not self.uris or not all(self.uris):
            raise ValueError("files is empty: name at least one file, folder or glob")
        if (self.queries is None) != (self.corpus is None):
            raise ValueError("queries and corpus go together: both tables are needed for data given as ids")
        if self.layout not in ("auto", "ids", "triples") and self.queries is not None:
            raise ValueError(f"layout {self.layout} holds its own texts; leave queries and corpus out, or use ids")
        if self.layout == "ids" and self.queries is None:
            raise ValueError("layout ids needs the tables with the texts: name them as queries and corpus")
        return self

    @property
    def uris(self) -> tuple[str, ...]:
        return (self.files,) if isinstance(self.files, str) else self.files

    def result_options(self) -> dict[str, Any]:
        """The settings that change what is trained on, beside the files themselves."""
        return self.model_dump(mode="json", include={"layout", "columns", "group", "max_documents"})
