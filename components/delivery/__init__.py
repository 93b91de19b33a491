"""From a trained model to a file that ships: export, proof, measure, select, bundle, report."""
