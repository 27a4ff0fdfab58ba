"""The interpolation weight of a run: given by the user, or fitted once on judged queries after scoring.

A fitted weight is stored create-only before anything is ranked with it, so that every attempt ranks alike.
"""

import json
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from crossenc.interpolation import fit_weight
from pipelines.config import RerankConfig
from pipelines.evaluate import read_qrels
from pipelines.merge import read_queries
from pipelines.plan import RUN_FOLDER, Plan
from pipelines.rank import first_stage_ranks, group_by_query, refuse_duplicates, stage_columns
from pipelines.storage import Location, put_new, read_bytes

_FITTED_FILE = f"{RUN_FOLDER}/interpolation.json"


def describe(config: RerankConfig) -> str:
    """The given interpolation in words; empty without one."""
    if config.interpolate is None or config.interpolate.weight is None:
        return ""
    return f"weight {config.interpolate.weight:g} of the model's score, as configured"


def decide(config: RerankConfig, plan: Plan, output: Location) -> tuple[float | None, str]:
    """The weight to rank with, and where it comes from in words. Fits it where the job says so."""
    if config.interpolate is None or config.interpolate.fit is None:
        return (config.interpolate.weight if config.interpolate else None), describe(config)
    try:
        body = read_bytes(output / _FITTED_FILE)
    except FileNotFoundError:
        body = put_new(output / _FITTED_FILE, _fit(config, config.interpolate.fit, plan, output))
    fitted = json.loads(body)
    return fitted["weight"], (
        f"weight {fitted['weight']:g} of the model's score, the best {fitted['measure']} ({fitted['value']:.4f}) on"
        f" {fitted['num_queries']:,} judged queries of {config.interpolate.fit}"
    )


def _fit(config: RerankConfig, qrels_uri: str, plan: Plan, output: Location) -> bytes:
    qrels = read_qrels(qrels_uri, config.storage_options)
    rows = read_queries(output, plan.fingerprint, list(qrels))
    groups = group_by_query(rows)
    stage = first_stage_ranks(groups, *stage_columns(rows))
    rows = refuse_duplicates(rows, groups, stage)
    scored = pc.is_null(rows.column("reason")).to_numpy()
    kept = rows.filter(pa.array(scored))
    query_ids = kept.column("query_id").to_pylist()
    fitted = fit_weight(
        kept.column("model_score").to_numpy().astype(np.float64),
        kept.column("stage_score").to_numpy(),
        stage[scored],
        kept.column("doc_id").to_pylist(),
        query_ids,
        {query_id: qrels[query_id] for query_id in dict.fromkeys(query_ids)} or qrels,
    )
    return json.dumps(asdict(fitted), indent=1).encode()
