"""Names of features. The embedding tables lie in an nn.ModuleDict, which refuses some names."""

TAKEN = frozenset(
    """
    T_destination _apply _backward_hooks _backward_pre_hooks _buffers _call_impl _compiled_call_impl _forward_hooks
    _forward_hooks_always_called _forward_hooks_with_kwargs _forward_pre_hooks _forward_pre_hooks_with_kwargs
    _get_backward_hooks _get_backward_pre_hooks _get_name _is_full_backward_hook _load_from_state_dict
    _load_state_dict_post_hooks _load_state_dict_pre_hooks _maybe_warn_non_full_backward_hook _modules
    _named_members _non_persistent_buffers_set _parameters _register_load_state_dict_pre_hook
    _register_state_dict_hook _replicate_for_data_parallel _save_to_state_dict _slow_forward _state_dict_hooks
    _state_dict_pre_hooks _version _wrapped_call_impl add_module apply bfloat16 buffers call_super_init children
    clear compile cpu cuda double dump_patches eval extra_repr float forward get_buffer get_extra_state
    get_parameter get_submodule half ipu items keys load_state_dict modules mtia named_buffers named_children
    named_modules named_parameters parameters pop register_backward_hook register_buffer register_forward_hook
    register_forward_pre_hook register_full_backward_hook register_full_backward_pre_hook
    register_load_state_dict_post_hook register_load_state_dict_pre_hook register_module register_parameter
    register_state_dict_post_hook register_state_dict_pre_hook requires_grad_ set_extra_state set_submodule
    share_memory state_dict to to_empty train training type update values xpu zero_grad
    """.split()  # noqa: SIM905  a list of 90 quoted words is not easier to read
)
"""Attributes of an empty nn.ModuleDict, those with double underscores aside. The configuration is read
without torch, so they stand here; a test compares them with the installed torch."""


def table_name_problem(name: str) -> str:
    """Why `name` cannot name an embedding table, with the way out; empty if it can."""
    way_out = "; give the feature another one, e.g. name = "
    if "." in name:
        return f"'{name}' has a dot, which cannot be part of a table's name{way_out}'{name.replace('.', '_')}'"
    if name in TAKEN or (name.startswith("__") and name.endswith("__")):
        return f"'{name}' cannot be a table's name, since torch uses it itself{way_out}'{name}_id'"
    return ""
