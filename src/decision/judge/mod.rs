//! Judgement: from samples on a tick grid to evidence, and from evidence to a verdict. Pure.
