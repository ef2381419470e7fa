/*
 * Tasks in the states a debugger must tell apart: D (a vfork parent waits
 * uninterruptibly for its child), T (stopped), Z (exited, not waited for).
 */
#include <signal.h>
#include <sys/wait.h>

#include "planted.h"

static void report(const char *state, pid_t pid)
{
	printf("task state=%s pid=%d\n", state, pid);
	fflush(stdout);
}

static pid_t child(const char *name)
{
	pid_t pid = fork();

	CHECK(pid >= 0);
	if (pid == 0)
		name_thread(name);
	return pid;
}

static void start_uninterruptible(void)
{
	pid_t pid = child("kstub-dstate");

	if (pid == 0) {
		if (vfork() == 0)
			for (;;)
				pause();
		_exit(0);
	}
	report("D", pid);
}

static void start_stopped(void)
{
	pid_t pid = child("kstub-stopped");

	if (pid == 0)
		for (;;)
			raise(SIGSTOP);
	waitpid(pid, NULL, WUNTRACED);
	report("T", pid);
}

static void start_zombie(void)
{
	pid_t pid = child("kstub-zombie");

	if (pid == 0)
		_exit(7);
	waitid(P_PID, pid, &(siginfo_t){ 0 }, WEXITED | WNOWAIT);
	report("Z", pid);
}

int main(void)
{
	name_thread("kstub-states");
	printf("pid=%d\ncomm=kstub-states\n", getpid());
	fflush(stdout);
	start_uninterruptible();
	start_stopped();
	start_zombie();
	planted();
	for (;;)
		pause();
}
