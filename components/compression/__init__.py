"""The twin, and the steps that make it smaller. The only room where tf_keras is imported."""
