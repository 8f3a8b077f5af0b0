/* The locks of the shards, and the loops over tokens, slots and entries, each of which does in one call what `numpy`,
 * `torch` or Python do in several.
 *
 * Optional. Every function has a counterpart in Python that leaves the same bytes and books; `native.py` says which is
 * used. Who calls it holds the locks that the counterpart needs, and keeps alive the contiguous tensors whose addresses it
 * passes. Indices are checked before anything is written. The types of the arguments are in `_native.pyi`.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "csrc/appends.h"
#include "csrc/arguments.h"
#include "csrc/copies.h"
#include "csrc/entries.h"
#include "csrc/gate.h"
#include "csrc/hashes.h"
#include "csrc/keys.h"
#include "csrc/locks.h"
#include "csrc/sharing.h"
#include "csrc/tables.h"

/* advise_huge_pages(address, bytes): fewer pages to look up, where the system has larger ones and agrees. */
static PyObject *advise_huge_pages(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    Py_ssize_t bytes;
    if (!enough(count, 2) || !integers(arguments + 1, 1, &bytes))
        return NULL;
    uintptr_t address = (uintptr_t)PyLong_AsVoidPtr(arguments[0]);
    if (PyErr_Occurred())
        return NULL;
#ifdef MADV_HUGEPAGE
    uintptr_t page = 4096, first = (address + page - 1) / page * page, last = (address + bytes) / page * page;
    if (last > first)
        madvise((void *)first, last - first, MADV_HUGEPAGE);
#endif
    Py_RETURN_NONE;
}

#define FUNCTION(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, NULL}

static PyMethodDef functions[] = {
    FUNCTION(gather),    FUNCTION(scatter),     FUNCTION(advise_huge_pages),
    FUNCTION(hash_rows), FUNCTION(hash_memory), FUNCTION(gather_stepwise),
    FUNCTION(bind),      FUNCTION(new_entries), FUNCTION(describe),
    FUNCTION(retain),    FUNCTION(let_go),      FUNCTION(find),
    FUNCTION(places),    FUNCTION(occupy),      FUNCTION(append),      FUNCTION(are_plain),
    FUNCTION(displace),  FUNCTION(in_runs),     FUNCTION(items_of),    FUNCTION(name_rows),
    FUNCTION(keep_for_ever), FUNCTION(lookup),
    {NULL, NULL, 0, NULL},
};

static int add_type(PyObject *module, PyTypeObject **type, PyType_Spec *spec)
{
    if (*type == NULL && (*type = (PyTypeObject *)PyType_FromSpec(spec)) == NULL)
        return 0;
    return PyModule_AddType(module, *type) == 0;
}

static int add_types(PyObject *module)
{
    return intern_tensor_names() && intern_index_names() && add_type(module, &tables_type, &tables_spec) &&
                   add_type(module, &uses_type, &uses_spec) && add_type(module, &shard_locks_type, &shard_locks_spec) &&
                   add_type(module, &held_type, &held_spec) && add_type(module, &gate_type, &gate_spec)
               ? 0
               : -1;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, add_types},
#if PY_VERSION_HEX >= 0x030C0000 /* what is static belongs to one interpreter */
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
#ifdef Py_GIL_DISABLED
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_native", .m_methods = functions, .m_slots = slots,
};

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&definition);
}
