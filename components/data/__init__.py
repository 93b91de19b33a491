"""Raw records to batches: source, schema, statistics, transform, preprocess, dataset."""
