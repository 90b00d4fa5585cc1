"""Parquet tables in, answers out; reads what `sweep` wrote and imports only its schema."""
