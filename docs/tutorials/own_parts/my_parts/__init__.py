"""Parts of one's own for jaxcl: a term, a stage, an encoder, a source and an evaluator."""
