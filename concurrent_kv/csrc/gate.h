/* `Gate`: how deep each thread is inside the library's critical sections. Its counterpart, with a lock for each thread, and
 * what it is for, are in `locks/gate.py`.
 *
 * Without the GIL, what all threads look at this often must be nothing that they change: the depth is the thread's own.
 */

#ifndef CONCURRENT_KV_GATE_H
#define CONCURRENT_KV_GATE_H

#include "arguments.h"

#ifdef _MSC_VER
#define OF_THREAD __declspec(thread)
#else
#define OF_THREAD _Thread_local
#endif

static OF_THREAD Py_ssize_t gate_depth;

static PyTypeObject *gate_type;

static PyObject *gate_enter(PyObject *gate, PyObject *unused)
{
    gate_depth++;
    Py_RETURN_NONE;
}

static PyObject *gate_exit(PyObject *gate, PyObject *const *arguments, Py_ssize_t count)
{
    if (gate_depth == 0) {
        PyErr_SetString(PyExc_RuntimeError, "the calling thread is in no critical section");
        return NULL;
    }
    gate_depth--;
    Py_RETURN_NONE;
}

static PyObject *gate_holds(PyObject *gate, PyObject *unused)
{
    return PyBool_FromLong(gate_depth != 0);
}

static PyMethodDef gate_methods[] = {
    {"__enter__", (PyCFunction)gate_enter, METH_NOARGS, NULL},
    {"__exit__", (PyCFunction)(void (*)(void))gate_exit, METH_FASTCALL, NULL},
    {"holds", (PyCFunction)gate_holds, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot gate_slots[] = {{Py_tp_methods, gate_methods}, {0, NULL}};

static PyType_Spec gate_spec = {"concurrent_kv._native.Gate", sizeof(PyObject), 0, Py_TPFLAGS_DEFAULT, gate_slots};

#endif
