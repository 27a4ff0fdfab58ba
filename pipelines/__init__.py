"""Ray pipelines around crossenc: reranking Parquet to Parquet, exactly once."""
