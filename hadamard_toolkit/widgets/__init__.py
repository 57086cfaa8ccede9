"""The interactive pruner: `pruning_state` is pure, `evaluation` asks the model, `pruner` only shows and passes on."""
