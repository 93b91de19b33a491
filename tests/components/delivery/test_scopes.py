"""Layer names in tensor names, in the two ways in which the two Kerases write them."""

from components.delivery.scopes import Scopes


def test_what_no_name_tells_stands_for_itself():
    assert Scopes(["a"], ["StatefulPartitionedCall:0"]).of(["StatefulPartitionedCall:0", "net_1/a_1/Relu"]) == ["a"]
    assert Scopes(["a", "a_1"], ["net/a/x", "net/a_1/x"]).of(["net/a_1/x"]) == ["a_1"]
    assert Scopes(["a", "a_1"], ["net_1/a_1/x", "net_1/a_1_2/x"]).of(["net_1/a_1/x", "net_1/a_1_2/x"]) == ["a", "a_1"]
