"""World model zoo: loading, saving and sharing checkpoints in the published layout, named models, model cards."""
