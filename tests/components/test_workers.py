import numpy as np
import pytest
import tensorflow as tf

from components.artifacts import Batches, DataSpec, Share
from components.errors import ContractError
from components.workers import Statistics, _pieces, agreed, check_share, several

ALONE = tf.distribute.get_strategy()


def test_one_process_is_not_several_and_agrees_with_itself(mirrored):
    for strategy in (ALONE, mirrored):
        assert not several(strategy)
        assert agreed(strategy, 0.25) == 0.25


def test_batches_that_are_cut_for_others_are_refused():
    spec = DataSpec(task="regression", input_name="x", input_shape=(1,))
    batches = Batches(spec=spec, training=lambda *_: None, ordered=lambda *_: None, rows={}, share=Share(0, 2))
    with pytest.raises(ContractError, match=r"cut for the 1 workers of the strategy, got a share of 1 in 2; make them"):
        check_share(ALONE, batches)


def local(strategy, variable):
    return [float(each) for each in strategy.experimental_local_results(strategy.run(lambda: tf.identity(variable)))]


def apart(strategy, **how):
    """A variable that holds 1 on the first replica and 2 on the second."""
    with strategy.scope():
        variable = tf.Variable(0.0, **how)
    strategy.run(tf.function(lambda: variable.assign(_number())))
    return variable


def _number():
    return 1.0 + tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.float32)


def test_statistics_that_each_replica_gathers_become_their_mean_on_all(mirrored):
    on_read = {"synchronization": tf.VariableSynchronization.ON_READ, "aggregation": tf.VariableAggregation.MEAN}
    for how in ({"trainable": False}, on_read):
        variable = apart(mirrored, **how)
        assert local(mirrored, variable) == [1, 2]
        Statistics(mirrored, [variable]).settle()
        assert local(mirrored, variable) == [1.5, 1.5]


def test_weights_and_counters_are_left_alone(mirrored):
    weight = apart(mirrored, trainable=True)
    with mirrored.scope():
        counter = tf.Variable(3, trainable=False)
    Statistics(mirrored, [weight, counter]).settle()
    assert local(mirrored, weight) == [1, 2]
    assert int(counter.numpy()) == 3


def test_a_batch_is_cut_into_pieces_for_the_devices_of_a_process():
    x, y = np.arange(12.0).reshape(6, 2), np.arange(6)
    found = list(tf.data.Dataset.from_tensors((x, y)).flat_map(lambda x, y: _pieces(3, x, y)))
    assert [part[1].numpy().tolist() for part in found] == [[0, 1], [2, 3], [4, 5]]
    assert [part[0].numpy().tolist() for part in found] == x.reshape(3, 2, 2).tolist()
    fixed = tf.data.Dataset.from_tensors((x, y)).flat_map(lambda x, y: _pieces(3, x, y))
    assert fixed.element_spec[0].shape == (2, 2)


def test_the_last_smaller_batch_gives_every_device_a_piece_be_it_empty():
    made = (
        tf.data.Dataset.from_tensor_slices((np.zeros((5, 2)), np.arange(5)))
        .batch(4)
        .flat_map(lambda x, y: _pieces(2, x, y))
    )
    assert [y.numpy().tolist() for _, y in made] == [[0, 1], [2, 3], [], [4]]
