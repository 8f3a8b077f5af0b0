/* `are_plain`: keys that nothing has to be asked of. Its counterpart is in `_checks.py`. */

#ifndef CONCURRENT_KV_KEYS_H
#define CONCURRENT_KV_KEYS_H

#include "arguments.h"

/* Whether a key is of a type that hashes and equals what it was stored under, and of which nothing has to be asked; or
 * a tuple of such. */
static int is_plain(PyObject *key, int depth)
{
    if (PyUnicode_CheckExact(key) || PyLong_CheckExact(key) || PyFloat_CheckExact(key) || PyBytes_CheckExact(key) ||
        PyBool_Check(key) || key == Py_None || PyComplex_CheckExact(key))
        return 1;
    if (!PyTuple_CheckExact(key) || depth == 0)
        return 0;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(key); i++)
        if (!is_plain(PyTuple_GET_ITEM(key, i), depth - 1))
            return 0;
    return 1;
}

/* are_plain(keys): whether nothing has to be asked of any of a list of keys; False where tuples are deep. */
static PyObject *are_plain(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    if (!enough(count, 1))
        return NULL;
    if (!PyList_Check(arguments[0])) {
        PyErr_Format(PyExc_TypeError, "keys must be a list, got %s", Py_TYPE(arguments[0])->tp_name);
        return NULL;
    }
    int plain = 1;
    Py_BEGIN_CRITICAL_SECTION(arguments[0]);
    for (Py_ssize_t i = 0; plain && i < PyList_GET_SIZE(arguments[0]); i++)
        plain = is_plain(PyList_GET_ITEM(arguments[0], i), 4);
    Py_END_CRITICAL_SECTION();
    return PyBool_FromLong(plain);
}

#endif
