"""Which heads a behaviour needs: nodes, faithfulness, attribution graphs (notebook 08)."""
