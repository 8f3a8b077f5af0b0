/* What threads that run at once, without the GIL, would otherwise wait for. Where the GIL is, both do nothing more than the
 * interpreter does by itself.
 */

#ifndef CONCURRENT_KV_SHARING_H
#define CONCURRENT_KV_SHARING_H

#include "arguments.h"

/* keep_for_ever(object): for what the whole process uses and its importing thread has just made: never freed, so that no
 * thread counts its references of it.
 */
static PyObject *keep_for_ever(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    if (!enough(count, 1))
        return NULL;
#ifdef Py_GIL_DISABLED
    if (_Py_IsOwnedByCurrentThread(arguments[0]))
        Py_SET_REFCNT(arguments[0], (Py_ssize_t)UINT32_MAX + 1); /* past its bound a count is not changed any more */
#endif
    Py_RETURN_NONE;
}

/* The value of a key, for the caller to let go of; NULL where there is none, or with an exception set. */
static PyObject *found_in(PyObject *dict, PyObject *key)
{
#if PY_VERSION_HEX >= 0x030D0000
    PyObject *found;
    PyDict_GetItemRef(dict, key, &found);
#else
    PyObject *found = PyDict_GetItemWithError(dict, key);
    Py_XINCREF(found);
#endif
    return found;
}

/* lookup(dict, key) -> its value, or None. As `dict.get`, which in CPython 3.13 takes the dict's lock, and once more inside
 * of that where the dict's key was made by another thread: then it waits for itself.
 */
static PyObject *lookup(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    if (!enough(count, 2))
        return NULL;
    if (!PyDict_Check(arguments[0])) {
        PyErr_Format(PyExc_TypeError, "lookup needs a dict, got %s", Py_TYPE(arguments[0])->tp_name);
        return NULL;
    }
    PyObject *found = found_in(arguments[0], arguments[1]);
    return found != NULL || PyErr_Occurred() ? found : Py_NewRef(Py_None);
}

#endif
